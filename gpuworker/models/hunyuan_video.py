"""Family "hunyuan_video": HunyuanVideoTransformer3DModel, text to video, as HunyuanVideoPipeline.

Guidance is an input of the transformer. The text comes from a language model that reads the prompt
inside the pipeline's template, and from CLIP; it is padded, so that attention has a mask of keys.
Video and text tokens attend to each other in one sequence and are both split over a group, the mask
with them. The text passes its refiner before, whole on every member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, Plan, degrees
from gpuworker.models.card import Asked, CardFacts, ModelRefused
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.frame_counts import frame_counts
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, numbers_of, stacked
from gpuworker.models.solvers import schedule_steps
from gpuworker.state import LatentState

_TEXT_TOKENS = 256
_TEXT_TOKENS_MIN = 8  # so that a group of eight can split them
_CLIP_TOKENS = 77
_LAYERS_SKIPPED = 2  # of the language model, at its end
_SIZE_MAX = 1280
_PIXELS_MAX = 1280 * 720  # of a frame, as its authors recommend at most
_FRAMES_MAX = 129  # which it was made for, and its default


class HunyuanVideoCard(DiffusersCard):
    """HunyuanVideo text to video."""

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        transformer = parts["transformer"]
        elastic = ElasticSP(transformer, joint=True, plan=_plan(transformer.config))
        super().__init__(parts, card, device, elastic)
        self._text_tokens = _text_tokens(card)
        self.facts = self._facts(name)

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        vae = self._parts["vae"].config
        shape = (  # [1, C, F, H, W]
            1,
            self._transformer.config.in_channels,
            (asked.frames - 1) // vae.temporal_compression_ratio + 1,
            asked.height // vae.spatial_compression_ratio,
            asked.width // vae.spatial_compression_ratio,
        )
        return {"latents": drawn(shape, generator)}

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        return self._text(prompt)

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae = self._parts["vae"]
        latents = state.tensors["latents"].to(self._device, vae.dtype)
        (video,) = vae.decode(latents / vae.config.scaling_factor, return_dict=False)
        return to_frames(video[0].transpose(0, 1))  # of [1, 3, F, H, W]

    def _facts(self, name: str) -> CardFacts:
        config, vae = self._transformer.config, self._parts["vae"].config
        # HunyuanVideoPipeline asks for multiples of 16 whatever the patches are.
        multiple = int(np.lcm(16, vae.spatial_compression_ratio * config.patch_size))
        multiple_frames = vae.temporal_compression_ratio * config.patch_size_t
        frames = frame_counts(self._card, multiple_frames, _FRAMES_MAX, _FRAMES_MAX)
        embedded = bool(config.guidance_embeds)
        return CardFacts(
            name=name,
            family="hunyuan_video",
            workflows=("txt2vid",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=multiple,
            size_max=_SIZE_MAX // multiple * multiple,
            pixels_max=_PIXELS_MAX,
            size_default=(1280 // multiple * multiple, 720 // multiple * multiple),
            frames_max=frames.most,
            frames_multiple=frames.multiple,
            frames_default=frames.default,
            fps=int(self._card.get("fps", 24)),
            steps_min=1,
            steps_max=100,
            steps_default=50,
            guidance="embedded" if embedded else "none",
            guidance_min=0.0,
            guidance_max=20.0,
            guidance_default=6.0 if embedded else 0.0,
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _text(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings [1, T, D] of a prompt, their mask [1, T], and CLIP's pooled one [1, P]."""
        template, crop = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
        length = int(crop) + self._text_tokens
        ids, mask = self._ids("tokenizer", str(template).format(prompt), length)
        hidden = self._parts["text_encoder"](
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states[-(_LAYERS_SKIPPED + 1)]
        words, _ = self._ids("tokenizer_2", prompt, _CLIP_TOKENS)
        pooled = self._parts["text_encoder_2"](words, output_hidden_states=False).pooler_output
        return {
            "prompt_embeds": hidden[:, crop:].to(self._dtype),
            "prompt_mask": mask[:, crop:].to(self._dtype),
            "pooled": pooled.to(self._dtype),
        }

    def _ids(self, tokenizer: str, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Token numbers and their mask, [1, length] each."""
        encoded = self._parts[tokenizer](
            [text],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded.input_ids.to(self._device), encoded.attention_mask.to(self._device)

    def _timing(self, state: LatentState) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 0.0, schedule_steps(state) + 1)[:-1]}

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        # The pipeline rounds each timestep to the latents' precision, which is its job's own.
        timesteps = [row.timestep.to(row.latents.dtype).float() for row in rows]
        velocity: Tensor
        (velocity,) = self._transformer(
            hidden_states=latents_of(rows).to(self._dtype),
            timestep=torch.stack(timesteps),
            encoder_hidden_states=stacked(rows, "prompt_embeds"),
            encoder_attention_mask=stacked(rows, "prompt_mask"),
            pooled_projections=stacked(rows, "pooled"),
            guidance=numbers_of(rows, "guidance_scale", self._dtype) * 1000.0,
            return_dict=False,
        )
        return velocity


def _text_tokens(card: dict[str, Any]) -> int:
    wanted = card.get("text_tokens", _TEXT_TOKENS)
    if not isinstance(wanted, int) or wanted < _TEXT_TOKENS_MIN:
        reason = f"text_tokens={wanted!r}: allowed is {_TEXT_TOKENS_MIN} and more"
        raise ModelRefused("card.json", reason)
    return wanted


def _plan(config: Any) -> Plan:
    """Rotary embeddings are split where they are made, tokens once, the mask at every block."""
    rotary = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    mask = ContextParallelInput(split_dim=3, expected_dims=4)
    blocks = [f"transformer_blocks.{place}" for place in range(config.num_layers)]
    blocks += [f"single_transformer_blocks.{place}" for place in range(config.num_single_layers)]
    return {
        "rope": {0: rotary, 1: rotary},
        blocks[0]: {
            "hidden_states": tokens,
            "encoder_hidden_states": tokens,
            "attention_mask": mask,
        },
        **{block: {"attention_mask": mask} for block in blocks[1:]},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
