"""A tiny Qwen-Image with random weights, and what the stock pipeline makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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


def qwen_pipeline() -> QwenImagePipeline:
    """Qwen-Image of 2 blocks."""
    torch.manual_seed(4)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=12,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 1.0, 2.0],
        ).eval(),
        text_encoder=_text_encoder(),
        tokenizer=tokenizer(1024),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


def _text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(WORDS),
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_reference(folder: Path, guidance_scale: float = 4.0) -> Reference:
    """40x56 px (35 image tokens), real guidance, two texts of unlike length."""
    pipeline = qwen_pipeline()
    settings = settings_of(width=40, height=56, frames=1, steps=8, guidance_scale=guidance_scale)
    settings["negative_prompt"] = "the night"
    save(pipeline, folder)
    arguments = of_pipeline(settings)
    arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    arguments.update(negative_prompt=settings["negative_prompt"], max_sequence_length=TEXT_TOKENS)
    latents = pipeline(**arguments, generator=generator(settings), output_type="latent").images
    images = pipeline(**arguments, generator=generator(settings), output_type="np").images
    return Reference(str(folder), settings, latents, (images * 255).round().astype(np.uint8))
