"""A tiny LTX-Video with random weights, and what the stock pipeline makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
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

DECODING = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}  # as its authors advise


def ltx_pipeline(conditioned: bool = False, inject_noise: bool = False) -> LTXPipeline:
    """LTX of 2 blocks; its decoder may be told a time, and may draw noise of its own."""
    torch.manual_seed(3)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        decoder_inject_noise=(inject_noise,) * 5,
        timestep_conditioning=conditioned,
        scaling_factor=0.8,
    ).eval()
    vae.latents_mean.uniform_(-0.5, 0.5)
    vae.latents_std.uniform_(0.5, 2.0)
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:  # zero before training: without effect
            torch.nn.init.normal_(parameter)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=1024,
            base_shift=0.95,
            max_shift=2.05,
            shift_terminal=0.1,
        ),
        vae=vae,
        text_encoder=T5EncoderModel(
            T5Config(
                d_model=32,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                vocab_size=len(WORDS),
            )
        ).eval(),
        tokenizer=tokenizer(TEXT_TOKENS),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            num_layers=2,
        ).eval(),
    )


def ltx_reference(
    folder: Path, guidance_scale: float = 3.0, frames: int = 17, **decoder: bool
) -> Reference:
    """17 frames of 96x96 px (27 video tokens) unless told otherwise, real guidance."""
    pipeline = ltx_pipeline(**decoder)
    settings = settings_of(width=96, height=96, frames=frames, steps=8)
    settings["guidance_scale"] = guidance_scale
    settings["negative_prompt"] = "the night"
    save(pipeline, folder)
    arguments: dict[str, Any] = {
        "max_sequence_length": TEXT_TOKENS,
        "negative_prompt": settings["negative_prompt"],
        "num_frames": settings["frames"],
        **of_pipeline(settings),
    }
    if decoder.get("conditioned"):
        arguments.update(DECODING)
        (folder / "card.json").write_text(json.dumps({"text_tokens": TEXT_TOKENS, **DECODING}))
    latents = pipeline(**arguments, generator=generator(settings), output_type="latent").frames
    video = pipeline(**arguments, generator=generator(settings), output_type="np").frames[0]
    return Reference(str(folder), settings, latents, (video * 255).round().astype(np.uint8))
