"""Latents to pixels by diffusers' own decoders, in bounded memory.

What a decode needs grows with the picture's area, and has to fit beside the denoiser's weights.
Above a family's threshold the decoder works tile by tile and blends the overlaps (diffusers'
`enable_tiling`): it needs what a tile needs, and the finished pixels. A tile does not see what lies
outside of it, so that the result differs a little from the whole picture's (how much:
tests/worker/test_decoding.py). Up to the threshold nothing is tiled, and the result is the stock
pipeline's to the bit.

Where memory runs out all the same, there are smaller tiles: diffusers' own size, a half, a quarter,
as far as the tiles' overlaps still are whole latent pixels. They are set for a block and taken back
behind it, since all requests share the model. Diffusers can also cut LTX's time into pieces, which
came out a frame off: those are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from gpuworker.state import LatentState

_SHARES = (1, 2, 4)  # tiles have diffusers' own sides, divided by these


def decoded(vae: Any, latents: Tensor, state: LatentState, tiled_over_px: int) -> Tensor:
    """What `vae` makes of `latents`, in tiles if a frame of `state` has more pixels than that."""
    width, height = state.facts["width"], state.facts["height"]
    assert isinstance(width, int | float) and isinstance(height, int | float), (width, height)
    large = width * height > tiled_over_px
    with tiles(vae, large):
        (pixels,) = vae.decode(latents, return_dict=False)
    return pixels


def tiles(vae: Any, large: bool) -> AbstractContextManager[None]:
    """A block in which `vae` works in tiles, if the picture is large; else as it is."""
    return _set(vae, {"use_tiling": True}) if large else nullcontext()


def smaller_tiles(vae: Any) -> Iterator[AbstractContextManager[None]]:
    """Blocks in which `vae` decodes in tiles, each in smaller ones than the block before."""
    for share in _SHARES:
        sides = {name: side // share for name, side in _sides(vae).items()}
        if all(side % share == 0 for side in _sides(vae).values()) and _fit(vae, sides):
            yield _set(vae, {"use_tiling": True, **sides})


def forget(vae: Any) -> None:
    """Drops what a decode that failed has left there: some decoders keep maps between frames."""
    if hasattr(vae, "clear_cache"):
        vae.clear_cache()


@contextmanager
def _set(vae: Any, values: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(vae, name) for name in values}
    vae.__dict__.update(values)
    try:
        yield
    finally:
        vae.__dict__.update(before)


def _sides(vae: Any) -> dict[str, int]:
    """Sides of tiles and distances between them, in pixels or latent pixels, by their names."""
    ends = ("_height", "_width", "_size")
    found = {
        name: value
        for name, value in vars(vae).items()
        if name.startswith(("tile_sample_", "tile_latent_")) and name.endswith(ends)
    }
    return found if all(isinstance(side, int) for side in found.values()) else {}


def _fit(vae: Any, sides: dict[str, int]) -> bool:
    """Tiles of those sides begin and overlap at whole latent pixels."""
    pixels = _latent_pixel_side(vae)
    for name, side in sides.items():
        _, of, kind = name.split("_", 2)
        if of == "latent":
            continue
        axis = kind.removeprefix("min_").removeprefix("stride_")
        factor = "tile_overlap_factor" + ("" if axis == "size" else f"_{axis}")
        shared = getattr(vae, factor, 0.0)
        latents = side // pixels
        apart = int(latents * (1 - shared)) * pixels
        if side < pixels or side % pixels or apart != side - int(side * shared):
            return False
    return bool(sides)


def _latent_pixel_side(vae: Any) -> int:
    """Pixels of a latent pixel's side."""
    for name in ("spatial_compression_ratio", "spatial_scale_factor"):
        if hasattr(vae, name):
            return int(getattr(vae, name))
    return int(2 ** (len(vae.config.block_out_channels) - 1))
