"""Tiny Stable Diffusion 3 and 3.5 medium, and what StableDiffusion3Pipeline makes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.worker.tiny_models import (
    TEXT_TOKENS,
    WORDS,
    Reference,
    generator,
    of_pipeline,
    save,
    settings_of,
    tokenizer,
)

_CLIP_TOKENS = 16


def sd3_pipeline(
    dual: tuple[int, ...] = (), t5: bool = True, channels: int = 4, **of_schedule: Any
) -> StableDiffusion3Pipeline:
    """SD3 of 3 blocks, those of `dual` with a second attention over the image alone."""
    torch.manual_seed(5)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **of_schedule),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        text_encoder=_clip(hidden=16, projection=8),
        tokenizer=tokenizer(_CLIP_TOKENS),
        text_encoder_2=_clip(hidden=12, projection=12),
        tokenizer_2=tokenizer(_CLIP_TOKENS),
        text_encoder_3=_t5() if t5 else None,
        tokenizer_3=tokenizer(TEXT_TOKENS) if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=channels,
            out_channels=channels,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=64,
            pooled_projection_dim=20,
            pos_embed_max_size=12,
            dual_attention_layers=dual,
            qk_norm="rms_norm" if dual else None,
        ).eval(),
    )


def sd3_reference(folder: Path) -> Reference:
    """35 image tokens (28x20 px), 16 + 13 text tokens, a fixed shift of the schedule."""
    return reference(folder, sd3_pipeline())


def sd35_medium_reference(folder: Path) -> Reference:
    """Two of three blocks attend over the image again; the schedule is shifted by the size."""
    shifting = {"use_dynamic_shifting": True, "max_shift": 1.16}
    return reference(folder, sd3_pipeline(dual=(0, 1), **shifting))


def reference(folder: Path, pipeline: StableDiffusion3Pipeline, scale: float = 5.0) -> Reference:
    """Saves it and lets it draw, as loaded from the folder.

    Weights that lie in memory otherwise make one ulp of difference in the pooled text.
    """
    settings = settings_of(width=28, height=20, frames=1, steps=8, guidance_scale=scale)
    settings["negative_prompt"] = "the night"
    save(pipeline, folder)
    t5 = ("text_encoder_3", "tokenizer_3")
    without = {part: None for part in t5 if getattr(pipeline, part) is None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, low_cpu_mem_usage=False, **without)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "max_sequence_length": TEXT_TOKENS,
        "negative_prompt": settings["negative_prompt"],
        **of_pipeline(settings),
    }
    latents = pipeline(**arguments, generator=generator(settings), output_type="latent").images
    images = pipeline(**arguments, generator=generator(settings), output_type="np").images
    return Reference(str(folder), settings, latents, (images * 255).round().astype(np.uint8))


def _clip(hidden: int, projection: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=hidden,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=len(WORDS),
            projection_dim=projection,
            max_position_embeddings=_CLIP_TOKENS,
            eos_token_id=1,
        )
    ).eval()


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=len(WORDS))
    ).eval()
