"""Family "wan": WanTransformer3DModel, text to video, as diffusers' WanPipeline runs it.

Guidance is two forwards, prompted and unconditional, inside the same step. Only the video tokens
are split over a group; the text stays whole. The noise scheduler must be flow-match Euler, whose
position is the step number: a multistep solver (UniPC) has a history that does not travel yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.elastic import Communicator, ElasticSP, degrees
from gpuworker.models.card import CardFacts, ModelCard, noise, number, positioned, to_frames
from gpuworker.models.decoding import decoded
from gpuworker.state import Fact, LatentState

_TEXT_TOKENS = 512
_SIZE_MAX = 1280
_TILED_OVER_PX = 1280 * 720  # a frame's, for the decoder; card.json may say otherwise
_EULER = "FlowMatchEulerDiscreteScheduler"


class SchedulerRefused(Exception):
    """A noise scheduler whose state cannot travel. Fields: `found`, `allowed` (class names)."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"noise scheduler {found} keeps a history between steps; use {allowed}")
        self.found, self.allowed = found, allowed


class WanCard(ModelCard):
    """Wan 2.1 text to video. Raises `SchedulerRefused`."""

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        found = type(parts["scheduler"]).__name__
        if found != _EULER:
            raise SchedulerRefused(found, _EULER)
        self._parts, self._card, self._device = parts, card, device
        self._transformer: Any = parts["transformer"]
        self._dtype: torch.dtype = self._transformer.dtype
        self._elastic = ElasticSP(self._transformer, joint=False)
        self.facts = self._facts(name)

    @torch.inference_mode()
    def encode(
        self,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        frames: int,
        steps: int,
        guidance_scale: float,
        seed: int,
    ) -> LatentState:
        self.facts.check(width, height, frames, steps, guidance_scale)
        config, vae = self._transformer.config, self._parts["vae"].config
        shape = (  # [1, C, F, H, W]
            1,
            config.in_channels,
            (frames - 1) // vae.scale_factor_temporal + 1,
            height // vae.scale_factor_spatial,
            width // vae.scale_factor_spatial,
        )
        tensors = {"latents": noise(shape, seed), "prompt_embeds": self._embed(prompt)}
        if guidance_scale > 1:
            tensors["negative_embeds"] = self._embed(negative_prompt)
        facts: dict[str, Fact] = dict(prompt=prompt, width=width, height=height, frames=frames)
        facts.update(guidance_scale=float(guidance_scale), seed=seed)
        return LatentState(tensors, 0, steps, facts).to(self._device)

    @torch.inference_mode()
    def step(self, state: LatentState, comm: Communicator | None) -> LatentState:
        tensors = state.to(self._device).tensors
        scheduler = positioned(
            type(self._parts["scheduler"]),
            self._parts["scheduler"].config,
            state.steps_done,
            num_inference_steps=state.steps_total,
            device=self._device,
        )
        timestep, latents = scheduler.timesteps[state.steps_done], tensors["latents"]
        with self._elastic.step(comm):
            velocity = self._velocity(latents, timestep, tensors["prompt_embeds"])
            if "negative_embeds" in tensors:
                plain = self._velocity(latents, timestep, tensors["negative_embeds"])
                velocity = plain + number(state, "guidance_scale") * (velocity - plain)
        (moved,) = scheduler.step(velocity, timestep, latents, return_dict=False)
        return state.advanced(moved)

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae = self._parts["vae"]
        latents = state.tensors["latents"].to(self._device, vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        tiled_over_px = int(self._card.get("tiled_over_px", _TILED_OVER_PX))
        video = decoded(vae, latents / (1.0 / std) + mean, state, tiled_over_px)  # [1, 3, F, H, W]
        return to_frames(video[0].transpose(0, 1))

    def _facts(self, name: str) -> CardFacts:
        vae, patch = self._parts["vae"].config, self._transformer.config.patch_size
        # WanPipeline asks for multiples of 16 whatever the patches are.
        multiple = int(np.lcm(16, vae.scale_factor_spatial * max(patch[1:])))
        frames_max = int(self._card.get("frames_max", 121))
        return CardFacts(
            name=name,
            family="wan",
            workflows=("txt2vid",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=multiple,
            size_max=_SIZE_MAX,
            size_default=(832 // multiple * multiple, 480 // multiple * multiple),
            frames_max=frames_max,
            frames_multiple=vae.scale_factor_temporal,
            frames_default=min(81, frames_max),
            steps_min=1,
            steps_max=100,
            steps_default=50,
            guidance="true_cfg",
            guidance_min=1.0,
            guidance_max=20.0,
            guidance_default=5.0,
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
            fps=int(self._card.get("fps", 16)),
        )

    def _embed(self, prompt: str) -> Tensor:
        """UMT5 embeddings [1, T, D] of a prompt; zero behind its last token."""
        encoder, length = self._parts["text_encoder"], self._card.get("text_tokens", _TEXT_TOKENS)
        encoded = self._parts["tokenizer"](
            [prompt_clean(prompt)],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = encoded.attention_mask.to(self._device)
        hidden = encoder(encoded.input_ids.to(self._device), mask).last_hidden_state
        embeds: Tensor = hidden.to(self._dtype).clone()
        embeds[:, int(mask.sum()) :] = 0
        return embeds

    def _velocity(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        velocity: Tensor
        (velocity,) = self._transformer(
            hidden_states=latents.to(self._dtype),
            timestep=timestep.expand(1),
            encoder_hidden_states=embeds,
            return_dict=False,
        )
        return velocity
