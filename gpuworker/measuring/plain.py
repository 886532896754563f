"""The same step as plain `diffusers` code: one transformer call a branch, the scheduler's step.

What a card's step is measured against. It shares nothing with the cards, so that what they cost
cannot hide here; the inputs are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gpuworker.state import LatentState


class PlainLoop(Protocol):
    """A batch of jobs under way."""

    latents: Tensor

    def step(self) -> Tensor:
        """Makes the next step; the latents behind it."""


class PlainFlux:
    """The loop of diffusers' FluxPipeline."""

    def __init__(
        self, transformer: Any, scheduler: Any, states: Sequence[LatentState], shift: float
    ) -> None:
        first = states[0].tensors
        device = first["latents"].device
        steps = states[0].steps_total
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift, device=device)
        self._transformer, self._scheduler, self._made = transformer, scheduler, 0
        self.latents = torch.cat([state.tensors["latents"] for state in states])
        self._text = {
            "pooled_projections": torch.cat([state.tensors["pooled"] for state in states]),
            "encoder_hidden_states": torch.cat([s.tensors["prompt_embeds"] for s in states]),
            "txt_ids": first["txt_ids"],
            "img_ids": first["img_ids"],
        }
        self._guidance = torch.full((len(states),), 3.5, device=device)

    @torch.inference_mode()
    def step(self) -> Tensor:
        timestep = self._scheduler.timesteps[self._made]
        (velocity,) = self._transformer(
            hidden_states=self.latents,
            timestep=timestep.expand(len(self.latents)).to(self.latents.dtype) / 1000,
            guidance=self._guidance,
            return_dict=False,
            **self._text,
        )
        (self.latents,) = self._scheduler.step(velocity, timestep, self.latents, return_dict=False)
        self._made += 1
        return self.latents


class PlainWan:
    """The loop of diffusers' WanPipeline, with guidance: two forwards."""

    def __init__(self, transformer: Any, scheduler: Any, states: Sequence[LatentState]) -> None:
        self.latents = torch.cat([state.tensors["latents"] for state in states])
        scheduler.set_timesteps(states[0].steps_total, device=self.latents.device)
        self._transformer, self._scheduler, self._made = transformer, scheduler, 0
        self._prompted = torch.cat([state.tensors["prompt_embeds"] for state in states])
        self._plain = torch.cat([state.tensors["negative_embeds"] for state in states])

    @torch.inference_mode()
    def step(self) -> Tensor:
        timestep = self._scheduler.timesteps[self._made]
        inputs = {
            "hidden_states": self.latents.to(self._transformer.dtype),
            "timestep": timestep.expand(len(self.latents)),
            "return_dict": False,
        }
        (prompted,) = self._transformer(encoder_hidden_states=self._prompted, **inputs)
        (plain,) = self._transformer(encoder_hidden_states=self._plain, **inputs)
        guided = plain + 5.0 * (prompted - plain)
        (self.latents,) = self._scheduler.step(guided, timestep, self.latents, return_dict=False)
        self._made += 1
        return self.latents


def plain_loop(transformer: Any, scheduler: Any, states: Sequence[LatentState]) -> PlainLoop:
    """The loop of the transformer's family, from the first states of a batch on."""
    if "negative_embeds" in states[0].tensors:
        return PlainWan(transformer, scheduler, states)
    tokens = states[0].tensors["latents"].shape[1]
    config = scheduler.config  # calculate_shift of the pipeline
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    shift = float(tokens * slope + config.base_shift - slope * low)
    return PlainFlux(transformer, scheduler, states, shift)
