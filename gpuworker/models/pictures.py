"""Pictures to tensors and back: pixels, masks, and what a VAE's encoder says of them.

As the stock pipelines do it: 0..255 becomes -1..1, a mask is black or white from the middle on and
taken to the latents' size without smoothing, and a VAE's posterior is sampled with the generator
that draws the noise afterwards.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.models.card import CardFacts, ShapeRefused

_WHITE_FROM = 128  # of 0..255


class Sampled(NamedTuple):
    """Raw latents of a VAE, and how many numbers were drawn from the generator for them."""

    latents: Tensor
    mean: Tensor | None  # None: the VAE has no posterior
    drawn: int


def check_picture(pixels: NDArray[np.uint8], facts: CardFacts) -> tuple[int, int]:
    """(width, height) of a picture that the model can take. Raises `ShapeRefused`."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise ShapeRefused("image", found, "uint8 [1, height, width, 3]")
    if len(pixels) != 1:
        raise ShapeRefused("image", f"{len(pixels)} frames", "1 frame")
    height, width = pixels.shape[1:3]
    facts.check_size(width, height)
    return width, height


def picture(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """float32 [frames, 3, H, W] in -1..1 of uint8 [frames, H, W, 3]."""
    unit = torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(0, 3, 1, 2)
    return (2.0 * unit - 1.0).to(device)


def to_frames(made: Tensor) -> NDArray[np.uint8]:
    """float [frames, 3, H, W] in -1..1 to uint8 [frames, H, W, 3], rounded as diffusers does."""
    unit = (made.float() * 0.5 + 0.5).clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())


def latent_mask(mask: NDArray[np.uint8], width: int, height: int, latent_px: int) -> Tensor:
    """float32 [1, 1, H, W] by latent pixel, 1 where something is made anew, else 0.

    `mask` is uint8 [1, height, width, 1]. Raises `ShapeRefused`.
    """
    if mask.dtype != np.uint8 or mask.shape != (1, height, width, 1):
        found, allowed = f"{mask.dtype} {list(mask.shape)}", f"uint8 [1, {height}, {width}, 1]"
        raise ShapeRefused("mask", found, allowed)
    white = torch.from_numpy((mask >= _WHITE_FROM).astype(np.float32)).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(white, size=(height // latent_px, width // latent_px))


def sampled(
    vae: Any, pixels: Tensor, generator: torch.Generator, tiles: AbstractContextManager[None]
) -> Sampled:
    """What `vae` makes of pixels, within `tiles`; its posterior is sampled with `generator`.

    Drawn in float32 on the CPU, so that every kind of device draws the same.
    """
    with tiles:
        told = vae.encode(pixels)
    if not hasattr(told, "latent_dist"):
        return Sampled(told.latents, None, 0)
    posterior = told.latent_dist
    drawn = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32)
    latents = posterior.mean + posterior.std * drawn.to(posterior.mean)
    return Sampled(latents, posterior.mode(), drawn.numel())
