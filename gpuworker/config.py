"""A worker's settings: read once at start, frozen, wrong ones stop the process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from hocket.config import Common
from hocket.messaging.media_bucket import KEPT_S

Role = Literal["text", "dit", "vae"]
NAME_PREFIX = r"^[a-z0-9][a-z0-9-]{0,40}$"
_ASSETS = Path(__file__).parent / "assets"
EMBEDDED_MODEL = _ASSETS / "hocket-emoji"  # pictures
EMBEDDED_MODELS = (EMBEDDED_MODEL, _ASSETS / "hocket-emoji-motion")


class WorkerSettings(Common, frozen=True, kw_only=True):
    """Settings of `python -m gpuworker`."""

    section: ClassVar[str] = "gpuworker"

    count: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1  # workers started by this command
    first_index: Annotated[int, msgspec.Meta(ge=0)] = 0  # of the first worker's name
    # Of the workers' names; none: the host's name. NATS subjects split at dots, so it has none.
    name_prefix: Annotated[str, msgspec.Meta(pattern=NAME_PREFIX)] | None = None
    executor: Literal["torch", "emulated"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu: str = ""  # what profiles call the device; "" derives it
    model: tuple[str, ...] = ()  # local folders or hub ids; none: the embedded ones
    # Nodes of the chain whose weights it loads and whose operations it offers; none: all three.
    role: tuple[Role, ...] = ()
    profile: Path | None = None  # CSV that the emulated executor runs by
    host: str = socket.gethostname()
    advertise: str = ""  # address at which other workers reach this one; "": as the broker does
    heartbeat_us: Annotated[int, msgspec.Meta(ge=10_000)] = 250_000
    batch_max: Annotated[int, msgspec.Meta(ge=1, le=32)] = 8  # jobs of one shape at a time
    memory_mib: Annotated[int, msgspec.Meta(ge=0)] = 0  # for weights, activations and latents
    latents_mib: Annotated[int, msgspec.Meta(ge=0)] = 0  # of it, for parked latents; 0: a quarter
    latents_host_mib: Annotated[int, msgspec.Meta(ge=0)] = 4096  # on the host, beside CUDA devices
    prompts_mib: Annotated[int, msgspec.Meta(ge=0)] = 256  # embeddings of prompts; 0: none are kept
    ahead: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2  # assignments whose inputs come before
    ahead_mib: Annotated[int, msgspec.Meta(ge=1)] = 256  # of such inputs
    groups_max: Annotated[int, msgspec.Meta(ge=1)] = 64  # communicators kept
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0  # for handing latents over at the end
    restarts_max: Annotated[int, msgspec.Meta(ge=0)] = 10  # of one worker within ten minutes
    # Of the media store, where control has not made it yet and a worker may.
    media_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: 4 GiB, or what there is
    media_kept_s: Annotated[float, msgspec.Meta(gt=0)] = KEPT_S
    # "default": blocks go through torch.compile, which each kind of shape pays for once.
    compile: Literal["off", "default"] = "off"
    # Where a sequence is split: our own exchange, xfuser's on a GPU, or xfuser's where it is there.
    attention: Literal["auto", "native", "xfuser"] = "auto"
