"""What can be set about a gateway."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from hocket.config import Common

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class GatewaySettings(Common, frozen=True, kw_only=True):
    """Settings of one gateway process."""

    section: ClassVar[str] = "gateway"

    listen: str = "127.0.0.1:0"  # "host:port"; port 0 picks a free one
    control: str = ""  # "host:port" of control; empty reads <state_dir>/control.json
    calls_max: Annotated[int, Meta(ge=1, le=100_000)] = 4096  # RPCs served at once
    media_bytes_max: Annotated[int, Meta(ge=1, le=4 << 30)] = 512 << 20  # of one result
    media_fetches_max: Annotated[int, Meta(ge=1, le=1024)] = 16  # results in memory at once
    media_timeout_s: Seconds = 60.0
    submit_timeout_s: Seconds = 10.0
    recheck_s: Seconds = 15.0  # silence after which control is asked how a request stands
    grace_s: Seconds = 10.0  # how long running calls may take to end at shutdown
