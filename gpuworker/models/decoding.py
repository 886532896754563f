"""Latents to pixels by diffusers' own decoders, in bounded memory.

What a decode needs grows with the picture's area, and has to fit beside the denoiser's weights.
Above a family's threshold the decoder works tile by tile and blends the overlaps (diffusers'
`enable_tiling`): it needs what a tile needs, and the finished pixels. A tile does not see what lies
outside of it, so that the result differs a little from the whole picture's (how much:
tests/worker/test_decoding.py). Up to the threshold nothing is tiled, and the result is the stock
pipeline's to the bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpuworker.models.card import number
from gpuworker.state import LatentState


def decoded(vae: Any, latents: Tensor, state: LatentState, tiled_over_px: int) -> Tensor:
    """What `vae` makes of `latents`, in tiles if a frame of `state` has more pixels than that."""
    if number(state, "width") * number(state, "height") > tiled_over_px:
        vae.enable_tiling()
    else:
        vae.disable_tiling()  # it is the model's, and the request before may have been larger
    (pixels,) = vae.decode(latents, return_dict=False)
    return pixels
