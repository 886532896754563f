"""Family "sd3": SD3Transformer2DModel, text to image, as StableDiffusion3Pipeline runs it.

Stable Diffusion 3 and 3.5 in all sizes. Two CLIPs and an optional T5 make one text; image and text
attend jointly, and some blocks of 3.5 medium attend over the image a second time, alone. Guidance
is one forward of two rows. The latents are a picture: patches are cut inside the transformer, so
that tokens exist, and are split, from its first block to its last projection only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, Plan, degrees
from gpuworker.models.card import Asked, CardFacts
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, stacked, timesteps_of
from gpuworker.models.solvers import schedule_steps
from gpuworker.state import LatentState

_T5_TOKENS = 256
_SIZE_MAX = 2048
_SIDE_TOKENS_MIN = 3  # 9 tokens: each of eight members has one

_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_PLAN: Plan = {
    "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class SD3Card(DiffusersCard):
    """Stable Diffusion 3 and 3.5; T5 may be missing, its embeddings are zero then."""

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        elastic = ElasticSP(parts["transformer"], joint=True, plan=_PLAN)
        super().__init__(parts, card, device, elastic)
        self.facts = self._facts(name)

    takes_pictures = True
    adapters_of = "sd3"

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        factor = self._vae_factor()
        shape = (
            1,
            self._transformer.config.in_channels,
            asked.height // factor,
            asked.width // factor,
        )
        return {"latents": drawn(shape, generator).to(self._dtype)}

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        embeds, pooled = self._text(prompt)
        return {"prompt_embeds": embeds, "pooled": pooled}

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae = self._parts["vae"]
        latents = state.tensors["latents"].to(self._device) / vae.config.scaling_factor
        latents = latents + vae.config.shift_factor
        (pictures,) = vae.decode(latents.to(vae.dtype), return_dict=False)
        return to_frames(pictures)

    def _facts(self, name: str) -> CardFacts:
        config, factor = self._transformer.config, self._vae_factor()
        multiple = factor * config.patch_size
        side = config.sample_size * factor // multiple * multiple
        return CardFacts(
            name=name,
            family="sd3",
            workflows=("txt2img",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=_SIDE_TOKENS_MIN * multiple,
            size_max=min(_SIZE_MAX, config.pos_embed_max_size * multiple),
            size_default=(side, side),
            frames_max=1,
            frames_multiple=1,
            frames_default=1,
            steps_min=1,
            steps_max=100,
            steps_default=int(self._card.get("steps_default", 28)),
            guidance="true_cfg",
            guidance_min=0.0,  # up to 1 there is none: the turbo models are run so
            guidance_max=20.0,
            guidance_default=float(self._card.get("guidance_default", 7.0)),
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Embeddings [1, CLIP's and T5's tokens, D], CLIP's filled up with zeros; pooled [1, P]."""
        clips = [self._clip(prompt, suffix) for suffix in ("", "_2")]
        clip, t5 = torch.cat([embeds for embeds, _ in clips], dim=-1), self._t5(prompt)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([pooled for _, pooled in clips], dim=-1)
        return torch.cat([clip, t5], dim=-2).to(self._dtype), pooled.to(self._dtype)

    def _clip(self, prompt: str, suffix: str) -> tuple[Tensor, Tensor]:
        """The last hidden layer but one, [1, T, D], and the projected pooled embedding [1, P]."""
        # Both texts have the first tokenizer's length, so that they can lie side by side.
        ids = self._ids("tokenizer" + suffix, prompt, self._parts["tokenizer"].model_max_length)
        told = self._parts["text_encoder" + suffix](ids, output_hidden_states=True)
        return told.hidden_states[-2], told[0]

    def _t5(self, prompt: str) -> Tensor:
        """[1, T, D]; the padding is attended to, as in the stock pipeline."""
        length = int(self._card.get("text_tokens", _T5_TOKENS))
        if "text_encoder_3" not in self._parts:
            width = self._transformer.config.joint_attention_dim
            return torch.zeros(1, length, width, dtype=self._dtype, device=self._device)
        embeds: Tensor = self._parts["text_encoder_3"](self._ids("tokenizer_3", prompt, length))[0]
        return embeds

    def _ids(self, tokenizer: str, prompt: str, length: int) -> Tensor:
        """Token ids [1, length]."""
        encoded = self._parts[tokenizer](
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids.to(self._device)

    def _timing(self, state: LatentState) -> dict[str, Any]:
        timing: dict[str, Any] = {"num_inference_steps": schedule_steps(state)}
        config, patch = self._parts["scheduler"].config, self._transformer.config.patch_size
        if config.get("use_dynamic_shifting"):
            height, width = state.tensors["latents"].shape[-2:]
            timing["mu"] = calculate_shift(
                (height // patch) * (width // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        return timing

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        velocity: Tensor
        with self._adapters.of([row.state for row in rows], self._device):
            (velocity,) = self._transformer(
                hidden_states=latents_of(rows),
                timestep=timesteps_of(rows),
                encoder_hidden_states=stacked(rows, "prompt_embeds", "negative_embeds"),
                pooled_projections=stacked(rows, "pooled", "negative_pooled"),
                return_dict=False,
            )
        return velocity

    def _scaled(self, latents: Tensor) -> Tensor:
        config = self._parts["vae"].config
        scaled: Tensor = (latents - config.shift_factor) * config.scaling_factor
        return scaled.to(self._dtype)

    def _latent_px(self) -> int:
        return self._vae_factor()

    def _vae_factor(self) -> int:
        """Pixels of a latent pixel's side."""
        return int(2 ** (len(self._parts["vae"].config.block_out_channels) - 1))
