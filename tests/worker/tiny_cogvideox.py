"""A tiny CogVideoX of random weights, and the stock pipeline's answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from tests.worker import tiny_models as tiny

_SOLVING = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
    set_alpha_to_one=True,
)


def cogvideox_reference(folder: Path, frames: int = 9) -> tiny.Reference:
    """As 2b: positions are added to the tokens, DDIM."""
    return _reference(folder, cogvideox_pipeline(), frames)


def cogvideox_rotary_reference(folder: Path, frames: int = 9) -> tiny.Reference:
    """As 5b: positions turn the tokens, and its DPM-Solver draws noise at every step."""
    scheduler = CogVideoXDPMScheduler(**_SOLVING, snr_shift_scale=1.0)
    pipeline = cogvideox_pipeline(scheduler, use_rotary_positional_embeddings=True)
    return _reference(folder, pipeline, frames)


def cogvideox_15_reference(folder: Path, frames: int = 9) -> tiny.Reference:
    """As 1.5: two frames a token, so that three latent frames are padded to four."""
    scheduler = CogVideoXDPMScheduler(**_SOLVING, snr_shift_scale=1.0)
    changes = dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False)
    return _reference(folder, cogvideox_pipeline(scheduler, **changes), frames)


def cogvideox_pipeline(scheduler: Any = None, **changes: Any) -> CogVideoXPipeline:
    """CogVideoX of 2 blocks, with the same weights at every call; DDIM unless told otherwise."""
    torch.manual_seed(5)
    return CogVideoXPipeline(
        tokenizer=tiny.tokenizer(tiny.TEXT_TOKENS),
        text_encoder=T5EncoderModel(
            T5Config(
                d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=len(tiny.WORDS)
            )
        ).eval(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ).eval(),
        scheduler=scheduler or CogVideoXDDIMScheduler(**_SOLVING, snr_shift_scale=3.0),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=2,
            sample_width=6,
            sample_height=4,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=tiny.TEXT_TOKENS,
            **changes,
        ).eval(),
    )


def _reference(folder: Path, pipeline: CogVideoXPipeline, frames: int) -> tiny.Reference:
    """Frames of 48x32 px (of nine: 18 video tokens, 13 of text), real guidance."""
    settings = tiny.settings_of(width=48, height=32, frames=frames, steps=8, guidance_scale=4.0)
    settings["negative_prompt"] = "the night"
    tiny.save(pipeline, folder)
    video = (_asked(pipeline, settings, "np")[0] * 255).round().astype(np.uint8)
    return tiny.Reference(str(folder), settings, cogvideox_latents(pipeline, settings), video)


def cogvideox_latents(
    pipeline: CogVideoXPipeline, settings: dict[str, Any], first: Tensor | None = None
) -> Tensor:
    """The stock pipeline's last latents, from its own first ones or others."""
    latents: Tensor = _asked(pipeline, settings, "latent", first)
    return latents


def _asked(
    pipeline: CogVideoXPipeline, settings: dict[str, Any], output: str, first: Tensor | None = None
) -> Any:
    generator = tiny.generator(settings)
    return pipeline(
        **tiny._of_wan(settings), generator=generator, latents=first, output_type=output
    ).frames
