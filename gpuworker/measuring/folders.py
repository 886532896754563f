"""A Flux folder with random weights, as diffusers would save one: something for a mesh to serve on
a machine that has no model.

The transformer is mid-sized (about 2.8 billion parameters), the decoder Flux's own size, the text
encoders small: what a mesh is measured by here are its steps.

`python -m gpuworker.measuring.folders PATH [--tiny]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from gpuworker.measuring.sizes import best_device, flux_vae, on_device

_WORDS = ("[PAD]", "[UNK]", "a", "fox", "on", "green", "background")
_CLIP_TOKENS = 77
_TEXT_TOKENS = 512


def write_folder(path: Path, tiny: bool = False) -> None:
    """Writes the folder, in bfloat16 where a GPU will serve it."""
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    text_tokens, width = (8, 32) if tiny else (_TEXT_TOKENS, 1024)
    transformer = {
        "num_layers": 1 if tiny else 8,
        "num_single_layers": 1 if tiny else 16,
        "num_attention_heads": 4 if tiny else 18,
        "attention_head_dim": 16 if tiny else 128,
        "axes_dims_rope": (4, 6, 6) if tiny else (16, 56, 56),
        "joint_attention_dim": width,
        "pooled_projection_dim": width,
        "guidance_embeds": True,
    }
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=on_device(lambda: flux_vae((8,) * 4, 4) if tiny else flux_vae(), device, dtype),
        text_encoder=on_device(lambda: CLIPTextModel(_clip(width)), device, dtype),
        tokenizer=tokenizer(_CLIP_TOKENS),
        text_encoder_2=on_device(lambda: T5EncoderModel(_t5(width)), device, dtype),
        tokenizer_2=tokenizer(text_tokens),
        transformer=on_device(lambda: FluxTransformer2DModel(**transformer), device, dtype),
    )
    pipeline.save_pretrained(path)
    sides = (32, 64) if tiny else (512, 768, 1024)
    card = {"text_tokens": text_tokens, "sizes": [[s, s] for s in sides], "size_default": sides[-1]}
    (path / "card.json").write_text(json.dumps(card))


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(_WORDS),
        projection_dim=width,
        max_position_embeddings=_CLIP_TOKENS,
        bos_token_id=1,
        eos_token_id=1,
    )


def _t5(width: int) -> T5Config:
    return T5Config(
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        vocab_size=len(_WORDS),
    )


def tokenizer(length: int) -> Any:
    """Whole words, padded to `length` tokens."""
    model = WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="[UNK]")
    words = Tokenizer(model)
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=length,
    )


if __name__ == "__main__":
    typer.run(write_folder)
