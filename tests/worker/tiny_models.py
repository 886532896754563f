"""Tiny random-weight models, saved as ordinary diffusers folders, and the stock pipelines' answers.

The pipelines are what Hocket promises to equal; nothing of ours takes part in them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from hocket.strength import steps_to_run

TEXT_TOKENS = 13  # odd on purpose: members get unequal shares
WORDS = ("[PAD]", "[UNK]", "a", "red", "blue", "fox", "boat", "on", "the", "sea", "at", "night")


@dataclass(frozen=True)
class Start:
    """Pictures that a job begins with, uint8 [1, H, W, 3]."""

    pixels: NDArray[np.uint8] | None
    strength: float = 1.0
    mask: NDArray[np.uint8] | None = None  # [1, H, W, 1]
    reference: NDArray[np.uint8] | None = None  # a picture to be edited, of any size
    loras: tuple[tuple[str, float], ...] = ()  # adapters and their scales
    control: NDArray[np.uint8] | None = None  # a picture for a ControlNet
    control_scale: float = 1.0


@dataclass(frozen=True)
class Reference:
    """A model folder, settings for `encode`, and what the stock pipeline makes of them."""

    folder: str
    settings: dict[str, Any]
    latents: Tensor
    frames: NDArray[np.uint8]
    start: Start | None = None  # with it the job is begun, not encoded

    @property
    def steps(self) -> int:
        """Steps that the job makes."""
        steps = int(self.settings["steps"])
        return steps_to_run(steps, self.start.strength) if self.start else steps


def flux_reference(folder: Path) -> Reference:
    """Flux of 2 + 2 blocks, 49 image tokens (28x28 px), 13 text tokens, embedded guidance."""
    torch.manual_seed(1)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=32,
                intermediate_size=37,
                num_attention_heads=4,
                num_hidden_layers=2,
                vocab_size=len(WORDS),
                projection_dim=32,
                max_position_embeddings=16,
                eos_token_id=1,
            )
        ).eval(),
        tokenizer=tokenizer(16),
        text_encoder_2=T5EncoderModel(
            T5Config(
                d_model=32,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                vocab_size=len(WORDS),
            )
        ).eval(),
        tokenizer_2=tokenizer(TEXT_TOKENS),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )
    settings = settings_of(width=28, height=28, frames=1, steps=8, guidance_scale=3.5)
    save(pipeline, folder)
    arguments = {"max_sequence_length": TEXT_TOKENS, **of_pipeline(settings)}
    latents = pipeline(**arguments, generator=generator(settings), output_type="latent").images
    images = pipeline(**arguments, generator=generator(settings), output_type="np").images
    return Reference(str(folder), settings, latents, (images * 255).round().astype(np.uint8))


def wan_pipeline(scheduler: Any = None) -> WanPipeline:
    """Wan of 2 blocks, with the same weights at every call."""
    torch.manual_seed(2)
    return WanPipeline(
        tokenizer=tokenizer(TEXT_TOKENS),
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                d_model=32,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                vocab_size=len(WORDS),
            )
        ).eval(),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval(),
    )


def wan_unipc_reference(folder: Path, frames: int = 9) -> Reference:
    """Wan with the multistep solver that it is published with."""
    return wan_reference(
        folder,
        UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=3.0,
        ),
        frames,
    )


def wan_reference(folder: Path, scheduler: Any = None, frames: int = 9) -> Reference:
    """9 frames of 48x32 px (18 video tokens) unless told otherwise, real guidance."""
    pipeline = wan_pipeline(scheduler)
    settings = settings_of(width=48, height=32, frames=frames, steps=8, guidance_scale=4.0)
    settings["negative_prompt"] = "the night"
    save(pipeline, folder)
    arguments = _of_wan(settings)
    latents = pipeline(**arguments, generator=generator(settings), output_type="latent").frames
    video = pipeline(**arguments, generator=generator(settings), output_type="np").frames[0]
    return Reference(str(folder), settings, latents, (video * 255).round().astype(np.uint8))


def wan_latents(settings: dict[str, Any]) -> list[Tensor]:
    """What the stock pipeline has after each step."""
    pipeline, behind = wan_pipeline(), []
    pipeline.set_progress_bar_config(disable=True)

    def note(_: Any, __: int, ___: Any, have: dict[str, Tensor]) -> dict[str, Tensor]:
        behind.append(have["latents"].clone())
        return have

    pipeline(
        **_of_wan(settings),
        generator=generator(settings),
        output_type="latent",
        callback_on_step_end=note,
    )
    return behind


def settings_of(**others: Any) -> dict[str, Any]:
    """Arguments of `encode`; `others` are the family's own."""
    return {"prompt": "a red fox on the sea", "negative_prompt": "", "seed": 11, **others}


def of_pipeline(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings under the pipelines' names."""
    names = {
        "prompt": "prompt",
        "width": "width",
        "height": "height",
        "steps": "num_inference_steps",
    }
    names["guidance_scale"] = "guidance_scale"
    return {theirs: settings[ours] for ours, theirs in names.items()}


def _of_wan(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "max_sequence_length": TEXT_TOKENS,
        "negative_prompt": settings["negative_prompt"],
        "num_frames": settings["frames"],
        **of_pipeline(settings),
    }


def generator(settings: dict[str, Any]) -> torch.Generator:
    """The generator that the pipelines get."""
    return torch.Generator("cpu").manual_seed(settings["seed"])


def tokenizer(length: int) -> Any:
    """A tokenizer of whole words that keeps `length` tokens."""
    model = WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=length,
    )


def save(pipeline: Any, folder: Path) -> None:
    """An ordinary diffusers folder, and our card.json in it."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"text_tokens": TEXT_TOKENS}))
