"""What can be set about a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from hocket.config import Common

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class GatewaySettings(Common, frozen=True, kw_only=True):
    """Settings of one gateway process."""

    section: ClassVar[str] = "gateway"

    listen: str = "127.0.0.1:0"  # "host:port"; port 0 picks a free one
    control: str = ""  # "host:port,…" of control replicas; empty: as the cluster says
    api_keys: Path | None = None  # file of `hocket keys`; none: callers say themselves who they are
    client_certs: bool = False  # with tls_dir: callers show a certificate of the cluster's CA, too
    calls_max: Annotated[int, Meta(ge=1, le=100_000)] = 4096  # streams and waits served at once
    keepalive_s: Seconds = 20.0  # a silent caller is asked whether it lives; it has half as long
    caller_stall_s: Seconds = 60.0  # a caller that takes nothing for so long is ended
    upload_s: Seconds = 120.0  # an upload that takes longer is ended
    # Bytes of uploads that one tenant may hold; 0: a quarter of the bucket.
    inputs_tenant_bytes_max: Annotated[int, Meta(ge=0)] = 0
    media_timeout_s: Seconds = 60.0  # how long the broker may be away before a fetch is given up
    submit_timeout_s: Seconds = 10.0  # how long a new request waits for control
    grace_s: Seconds = 10.0  # how long running calls may take to end at shutdown
