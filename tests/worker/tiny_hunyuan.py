"""A tiny HunyuanVideo of random weights, and the stock pipeline's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from tests.worker import tiny_models as tiny

# The template's end (4 tokens after the crop), the prompt (6), 3 of the template, 16 of padding:
# more than a member's share, so that a mask that is split unlike the tokens is seen.
TEXT_TOKENS = 29


def hunyuan_reference(folder: Path, frames: int = 9) -> tiny.Reference:
    """9 frames of 48x32 px (72 video tokens, 29 of text), or others; embedded guidance."""
    pipeline = hunyuan_pipeline()
    settings = tiny.settings_of(width=48, height=32, frames=frames, steps=8, guidance_scale=6.0)
    tiny.save(pipeline, folder)
    (folder / "card.json").write_text(json.dumps({"text_tokens": TEXT_TOKENS}))
    video = (_asked(pipeline, settings, "np")[0] * 255).round().astype(np.uint8)
    return tiny.Reference(str(folder), settings, hunyuan_latents(pipeline, settings), video)


def hunyuan_latents(pipeline: HunyuanVideoPipeline, settings: dict[str, Any]) -> Tensor:
    """The stock pipeline's last latents."""
    latents: Tensor = _asked(pipeline, settings, "latent")
    return latents


def _asked(pipeline: HunyuanVideoPipeline, settings: dict[str, Any], output: str) -> Any:
    arguments = {**tiny._of_wan(settings), "max_sequence_length": TEXT_TOKENS}
    del arguments["negative_prompt"]
    generator = tiny.generator(settings)
    return pipeline(**arguments, generator=generator, output_type=output).frames


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    """HunyuanVideo of 2 + 2 blocks, with the same weights at every call."""
    torch.manual_seed(6)
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=37,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(tiny.WORDS),
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        ).eval(),
        tokenizer=tiny.tokenizer(256),
        text_encoder_2=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=8,
                intermediate_size=37,
                num_attention_heads=4,
                num_hidden_layers=2,
                vocab_size=len(tiny.WORDS),
                projection_dim=8,
                max_position_embeddings=77,
                eos_token_id=1,
            )
        ).eval(),
        tokenizer_2=tiny.tokenizer(77),
        vae=AutoencoderKLHunyuanVideo(
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=10,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ).eval(),
    )
