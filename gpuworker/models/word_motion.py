"""Clips by a Flux transformer: our shipped model of moving pictures.

`WordFluxCard` drawn out over time. The tokens are those of a few frames after one another, so that
one attention sees the whole clip and every layout that splits a picture splits a clip:

    frames [F, C, rows, columns] ──k frames a token──▶ tokens [F/k · rows · columns, k·C]

A token's rotary position has its time on axis 0. Rotary positions tell differences alone, and a
motion runs over absolute time: the transformer's last input channels therefore say when and where
a token is, sines and cosines of the whole motion's length and the place in -1..1. They follow from
the positions, and are no part of the state.

A motion is as long as the clips that training saw (card.json: "frames"). A shorter clip is its
beginning, frame for frame at the same times, which the model draws as well as the whole; times
behind the motion's end it has never seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.models.card import Asked, CardFacts
from gpuworker.models.flux import WordFluxCard
from gpuworker.models.rows import Row, drawn, latents_of, number
from gpuworker.state import LatentState

_FRAMES_AT_ONCE = 4  # of a decode


class WordMotionCard(WordFluxCard):
    """Our own small models of clips; at most as long as those that they were trained on."""

    takes_pictures = False

    def _facts(self, name: str) -> CardFacts:
        frames = int(self._card["frames"])
        return replace(
            super()._facts(name),
            workflows=("txt2vid",),
            frames_min=self._frames_a_token(),
            frames_max=frames,
            frames_multiple=self._frames_a_token(),
            frames_offset=0,
            frames_default=frames,
            fps=int(self._card["fps"]),
        )

    def _canvas(self, asked: Asked, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        patch, span = self._card["patch_px"], self._card["position_span"]
        rows, columns = asked.height // patch, asked.width // patch
        times = asked.frames // self._frames_a_token()
        channels = self._parts["vae"].config.latent_channels
        shape = (times, self._frames_a_token(), channels, rows, columns)
        ids = torch.zeros(times, rows, columns, 3)
        # Below zero, where no text token is.
        since = torch.arange(times) * -self._card["time_span"] / self._motion_times()
        ids[..., 0] = since[:, None, None]
        ids[..., 1] = ((torch.arange(rows) + 0.5) * span / rows)[:, None]
        ids[..., 2] = ((torch.arange(columns) + 0.5) * span / columns)[None]
        frames = drawn(shape, generator)
        tokens = frames.permute(0, 3, 4, 1, 2).reshape(1, times * rows * columns, -1)
        return tokens.to(self._dtype), ids.reshape(-1, 3)

    def _input(self, rows: Sequence[Row]) -> Tensor:
        latents = latents_of(rows)
        places = self._places(rows[0].state.tensors["img_ids"]).to(latents.dtype)
        return torch.cat([latents, places.expand(len(rows), -1, -1)], 2)

    def _places(self, ids: Tensor) -> Tensor:
        """When and where the tokens at those positions are: [N, 8]."""
        card = self._card
        share = -ids[:, 0] / card["time_span"] + 0.5 / self._motion_times()
        turn = 2 * math.pi * share
        where = ids[:, 1:] * 2 / card["position_span"] - 1
        waves = [turn.sin(), turn.cos(), (2 * turn).sin(), (2 * turn).cos(), (4 * turn).sin()]
        return torch.cat([torch.stack([*waves, 2 * share - 1], 1), where], 1)

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        latents = self._unpack(state.to(self._device)).to(self._parts["vae"].dtype)
        # A frame knows nothing of the others to the decoder: a few at a time bound the memory.
        parts = [self._pixels(part, state) for part in latents.split(_FRAMES_AT_ONCE)]
        return np.concatenate(parts)

    def _unpack(self, state: LatentState) -> Tensor:
        patch = self._card["patch_px"]
        width, height = (int(number(state, side)) // patch for side in ("width", "height"))
        times = int(number(state, "frames")) // self._frames_a_token()
        pairs = state.tensors["latents"].view(times, height, width, self._frames_a_token(), -1)
        frames = pairs.permute(0, 3, 4, 1, 2).flatten(0, 1)
        return frames / float(self._card["latent_scaling"]) + float(self._card["latent_shift"])

    def _motion_times(self) -> int:
        """Tokens along time of a whole motion."""
        return int(self._card["frames"]) // self._frames_a_token()

    def _frames_a_token(self) -> int:
        return int(self._card["frames_a_token"])
