"""Every family by name: how its tiny model is made, and what tests should know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.worker.tiny_adapters import flux_loras, sd3_loras
from tests.worker.tiny_cogvideox import (
    cogvideox_15_reference,
    cogvideox_reference,
    cogvideox_rotary_reference,
)
from tests.worker.tiny_hunyuan import hunyuan_reference
from tests.worker.tiny_ltx import ltx_reference
from tests.worker.tiny_models import (
    Reference,
    flux_reference,
    wan_reference,
    wan_unipc_reference,
)
from tests.worker.tiny_pictures import (
    flux_control,
    flux_inpaint,
    flux_kontext,
    qwen_img2img,
    sd3_inpaint,
)
from tests.worker.tiny_pixart import pixart_reference
from tests.worker.tiny_qwen import qwen_reference
from tests.worker.tiny_sd3 import sd3_reference, sd35_medium_reference


@dataclass(frozen=True)
class Family:
    """`make` saves a tiny model into a folder and asks the stock pipeline; `cfg`: halves it has."""

    make: Callable[[Path], Reference]
    cfg: tuple[int, ...] = (1, 2)
    full: bool = False  # only in `make test-full`


FAMILIES: Mapping[str, Family] = {
    "flux": Family(flux_reference, cfg=(1,)),
    "ltx": Family(ltx_reference),
    "qwen": Family(qwen_reference),
    "pixart": Family(pixart_reference),
    "sd3": Family(sd3_reference),
    "sd35-medium": Family(sd35_medium_reference),
    "wan": Family(wan_reference),
    "wan-unipc": Family(wan_unipc_reference),
    "cogvideox": Family(cogvideox_reference),
    "cogvideox-rotary": Family(cogvideox_rotary_reference),
    "hunyuan": Family(hunyuan_reference, cfg=(1,)),
    "flux-kontext": Family(flux_kontext, cfg=(1,), full=True),
    "flux-control": Family(flux_control, cfg=(1,)),
    "flux-inpaint": Family(flux_inpaint, cfg=(1,)),
    "flux-loras": Family(flux_loras, cfg=(1,), full=True),
    "sd3-loras": Family(sd3_loras),
    "sd3-inpaint": Family(sd3_inpaint, full=True),
    "qwen-img2img": Family(qwen_img2img, full=True),
}


@dataclass(frozen=True)
class Lengths:
    """Other numbers of frames than `FAMILIES` has; `make test` runs the first."""

    make: Callable[..., Reference]  # with `frames`
    frames: tuple[int, ...]
    refused: int  # one that the autoencoder cannot make


VIDEOS: Mapping[str, Lengths] = {
    "ltx": Lengths(ltx_reference, (9, 1, 41), refused=12),
    "wan": Lengths(wan_reference, (13, 1, 21), refused=12),
    "wan-unipc": Lengths(wan_unipc_reference, (5, 33), refused=7),
    "cogvideox": Lengths(cogvideox_reference, (17, 1, 33), refused=13),
    "cogvideox-rotary": Lengths(cogvideox_rotary_reference, (17, 1, 33), refused=13),
    "cogvideox-1.5": Lengths(cogvideox_15_reference, (17, 1, 33), refused=13),
    "hunyuan": Lengths(hunyuan_reference, (5, 1, 29), refused=6),
}
