"""Family "pixart": PixArtTransformer2DModel, text to image, as PixArtSigmaPipeline runs it.

PixArt-Sigma attends over the image, and from the image to a T5 text whose padding is masked. Only
the image is split over a group; every member has the whole text. Guidance is one forward of two
rows; of the output channels, the second half is a learned variance that no solver here asks for.
Pictures have the size that was asked for: the pipeline's binning of resolutions is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import PixArtSigmaPipeline
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.utils import is_bs4_available, is_ftfy_available
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, Plan, degrees
from gpuworker.models.card import Asked, CardFacts
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, stacked, timesteps_of
from gpuworker.models.solvers import schedule_steps
from gpuworker.state import LatentState

_TEXT_TOKENS = 300
_PIPELINE_MULTIPLE = 8  # PixArtSigmaPipeline asks for it whatever the VAE and the patches are
_SIDE_TOKENS_MIN = 3  # 9 tokens: each of eight members has one

_PLAN: Plan = {
    "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class PixArtCard(DiffusersCard):
    """PixArt-Sigma."""

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        elastic = ElasticSP(parts["transformer"], joint=False, plan=_PLAN)
        super().__init__(parts, card, device, elastic)
        self.facts = self._facts(name)

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        factor = self._vae_factor()
        shape = (
            1,
            self._transformer.config.in_channels,
            asked.height // factor,
            asked.width // factor,
        )
        return {"latents": drawn(shape, generator).to(self._dtype)}

    def _noise_alone(self, state: LatentState) -> LatentState:
        latents = state.tensors["latents"] * self._noise_scale(state.steps_total)
        return replace(state, tensors={**state.tensors, "latents": latents.to(self._dtype)})

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        embeds, mask = self._text(prompt)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae = self._parts["vae"]
        latents = state.tensors["latents"].to(self._device, vae.dtype)
        (pictures,) = vae.decode(latents / vae.config.scaling_factor, return_dict=False)
        return to_frames(pictures)

    def _facts(self, name: str) -> CardFacts:
        config, factor = self._transformer.config, self._vae_factor()
        multiple = int(np.lcm(_PIPELINE_MULTIPLE, factor * config.patch_size))
        side = config.sample_size * factor // multiple * multiple
        return CardFacts(
            name=name,
            family="pixart",
            workflows=("txt2img",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=_SIDE_TOKENS_MIN * multiple,
            size_max=2 * side,  # the longest side that it was trained with: 4:1 on the same area
            pixels_max=side * side,
            size_default=(side, side),
            frames_max=1,
            frames_multiple=1,
            frames_default=1,
            steps_min=1,
            steps_max=100,
            steps_default=int(self._card.get("steps_default", 20)),
            guidance="true_cfg",
            guidance_min=0.0,  # up to 1 there is none: distilled models are run so
            guidance_max=20.0,
            guidance_default=float(self._card.get("guidance_default", 4.5)),
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 embeddings [1, T, D], and which of them are text: 1 or 0, [1, T]."""
        clean = is_bs4_available() and is_ftfy_available()  # else it only warns, every time
        encoded = self._parts["tokenizer"](
            _Captions()._text_preprocessing(prompt, clean_caption=clean),
            padding="max_length",
            max_length=int(self._card.get("text_tokens", _TEXT_TOKENS)),
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        mask: Tensor = encoded.attention_mask.to(self._device)
        ids = encoded.input_ids.to(self._device)
        embeds: Tensor = self._parts["text_encoder"](ids, attention_mask=mask)[0]
        return embeds.to(self._dtype), mask

    def _noise_scale(self, steps: int) -> float | Tensor:
        """What the noise scheduler multiplies the first noise with; 1 for the published one."""
        scheduler = self._parts["scheduler"]
        anew = type(scheduler).from_config(scheduler.config)
        anew.set_timesteps(num_inference_steps=steps)
        scale: float | Tensor = getattr(anew, "init_noise_sigma", 1.0)
        return scale

    def _timing(self, state: LatentState) -> dict[str, Any]:
        return {"num_inference_steps": schedule_steps(state)}

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        predicted: Tensor
        (predicted,) = self._transformer(
            hidden_states=latents_of(rows),
            timestep=timesteps_of(rows),
            encoder_hidden_states=stacked(rows, "prompt_embeds", "negative_embeds"),
            encoder_attention_mask=stacked(rows, "prompt_mask", "negative_mask"),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )
        channels = self._transformer.config.in_channels
        learned = predicted.shape[1] == 2 * channels
        return predicted[:, :channels].contiguous() if learned else predicted

    def _vae_factor(self) -> int:
        """Pixels of a latent pixel's side."""
        return int(2 ** (len(self._parts["vae"].config.block_out_channels) - 1))


class _Captions(PixArtSigmaPipeline):
    """The stock pipeline's cleaning of prompts, which asks for none of its models."""

    def __init__(self) -> None:
        pass
