"""Family "wan": WanTransformer3DModel, text to video, as diffusers' WanPipeline runs it.

Guidance is two forwards, prompted and unconditional, inside the same step. Only the video tokens
are split over a group; the text stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, degrees
from gpuworker.models.card import Asked, CardFacts
from gpuworker.models.decoding import decoded
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.frame_counts import frame_counts
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, stacked, timesteps_of
from gpuworker.models.solvers import schedule_steps
from gpuworker.state import LatentState

_TEXT_TOKENS = 512
_SIZE_MAX = 1280
_PIXELS_MAX = 1280 * 720  # of a frame, as its authors recommend at most
_FRAMES_MAX, _FRAMES_DEFAULT = 121, 81  # made for 81; no limit is documented but 4 k + 1
_TILED_OVER_PX = 1280 * 720  # a frame's, for the decoder; card.json may say otherwise


class WanCard(DiffusersCard):
    """Wan 2.1 text to video."""

    branches_together = False

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        super().__init__(parts, card, device, ElasticSP(parts["transformer"], joint=False))
        self.facts = self._facts(name)

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        config, vae = self._transformer.config, self._parts["vae"].config
        shape = (  # [1, C, F, H, W]
            1,
            config.in_channels,
            (asked.frames - 1) // vae.scale_factor_temporal + 1,
            asked.height // vae.scale_factor_spatial,
            asked.width // vae.scale_factor_spatial,
        )
        return {"latents": drawn(shape, generator)}

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        return {"prompt_embeds": self._embed(prompt)}

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
        frames = frame_counts(self._card, vae.scale_factor_temporal, _FRAMES_MAX, _FRAMES_DEFAULT)
        return CardFacts(
            name=name,
            family="wan",
            workflows=("txt2vid",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=multiple,
            size_max=_SIZE_MAX,
            pixels_max=_PIXELS_MAX,
            size_default=(832 // multiple * multiple, 480 // multiple * multiple),
            frames_max=frames.most,
            frames_multiple=frames.multiple,
            frames_default=frames.default,
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

    def _timing(self, state: LatentState) -> dict[str, Any]:
        return {"num_inference_steps": schedule_steps(state)}

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        velocity: Tensor
        (velocity,) = self._transformer(
            hidden_states=latents_of(rows).to(self._dtype),
            timestep=timesteps_of(rows),
            encoder_hidden_states=stacked(rows, "prompt_embeds", "negative_embeds"),
            return_dict=False,
        )
        return velocity
