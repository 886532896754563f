"""A tiny PixArt-Sigma, and what PixArtSigmaPipeline makes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel

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


def solver(beta_end: float) -> DPMSolverMultistepScheduler:
    """The solver that PixArt-Sigma is published with, there with a `beta_end` of 0.02.

    Such a schedule begins with noise of which 1/160 is picture; a model that cannot predict it
    makes latents of 600 then, of which float32 has no four places behind the point.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.0001,
        beta_end=beta_end,
        beta_schedule="linear",
        solver_order=2,
        algorithm_type="dpmsolver++",
        timestep_spacing="linspace",
    )


def pixart_pipeline(scheduler: Any = None) -> PixArtSigmaPipeline:
    """PixArt of 2 blocks, with the same weights at every call."""
    torch.manual_seed(6)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(TEXT_TOKENS),
        text_encoder=T5EncoderModel(
            T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=len(WORDS))
        ).eval(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.13025,
        ).eval(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=64,
            caption_channels=32,
            sample_size=16,
            interpolation_scale=2,
            use_additional_conditions=False,
        ).eval(),
        scheduler=scheduler or solver(beta_end=0.002),
    )


def pixart_reference(folder: Path, scale: float = 4.5, scheduler: Any = None) -> Reference:
    """15 image tokens (40x24 px), 13 text tokens of which some are padding, real guidance."""
    settings = settings_of(width=40, height=24, frames=1, steps=8, guidance_scale=scale)
    settings["negative_prompt"] = "the night"
    save(pixart_pipeline(scheduler), folder)
    # As loaded from the folder: where weights lie in memory changes the last bit.
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "max_sequence_length": TEXT_TOKENS,
        "negative_prompt": settings["negative_prompt"],
        "use_resolution_binning": False,
        **of_pipeline(settings),
    }
    latents = pipeline(**arguments, generator=generator(settings), output_type="latent").images
    images = pipeline(**arguments, generator=generator(settings), output_type="np").images
    return Reference(str(folder), settings, latents, (images * 255).round().astype(np.uint8))
