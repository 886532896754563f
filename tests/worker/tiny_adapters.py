"""LoRA adapters for tiny models, and what the stock pipeline makes with them.

With peft installed the pipeline loads them itself (`load_lora_weights`, `set_adapters`); without it
their products are added to its weights, which is what that means.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worker.tiny_models import TEXT_TOKENS, Reference, Start, flux_reference, of_pipeline
from tests.worker.tiny_pictures import drawn
from tests.worker.tiny_sd3 import sd3_reference

HAS_PEFT = importlib.util.find_spec("peft") is not None
SCALES = (("detail", -0.7), ("style", 0.8))
FLUX_LAYERS = {
    "style": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.1.ff.net.0.proj",
        "single_transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.1.proj_out",
        "transformer_blocks.0.norm1.linear",
    ),
    "detail": (
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.1.proj_mlp",
        "proj_out",
    ),
}
SD3_LAYERS = {
    "style": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj"),
    "detail": ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.ff.net.2", "proj_out"),
}


def flux_loras(folder: Path) -> Reference:
    """Flux with two adapters, of unlike ranks."""
    return with_loras(flux_reference(folder), FluxPipeline, FLUX_LAYERS)


def sd3_loras(folder: Path) -> Reference:
    """SD3 with two adapters, of unlike ranks."""
    return with_loras(sd3_reference(folder), StableDiffusion3Pipeline, SD3_LAYERS)


def with_loras(plain: Reference, kind: Any, layers: Mapping[str, tuple[str, ...]]) -> Reference:
    """What the stock pipeline makes of the folder's model and `SCALES` of both adapters."""
    folder, settings = Path(plain.folder), plain.settings
    pipeline = kind.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    (folder / "loras").mkdir()
    for place, (name, modules) in enumerate(layers.items()):
        weights = adapter(pipeline.transformer, modules, rank=2 + place, seed=place)
        save_file(weights, folder / "loras" / f"{name}.safetensors")
    if HAS_PEFT:
        for name in layers:
            pipeline.load_lora_weights(folder / "loras", f"{name}.safetensors", adapter_name=name)
        pipeline.set_adapters([name for name, _ in SCALES], [scale for _, scale in SCALES])
    else:
        for name, scale in SCALES:
            weights = load_file(folder / "loras" / f"{name}.safetensors")
            merge(pipeline.transformer, products(weights), scale)
    arguments = {"max_sequence_length": TEXT_TOKENS, **of_pipeline(settings)}
    if settings["negative_prompt"]:
        arguments["negative_prompt"] = settings["negative_prompt"]
    return drawn(pipeline, plain, arguments, Start(None, loras=SCALES))


def adapter(
    denoiser: torch.nn.Module, modules: tuple[str, ...], rank: int, seed: int
) -> dict[str, Tensor]:
    """Random layers by diffusers' names, strong enough to be seen."""
    generator, weights = torch.Generator().manual_seed(100 + seed), {}
    for module in modules:
        base = denoiser.get_submodule(module)
        assert isinstance(base, torch.nn.Linear)
        for name, shape in (("A", (rank, base.in_features)), ("B", (base.out_features, rank))):
            weights[f"transformer.{module}.lora_{name}.weight"] = 0.2 * torch.randn(
                shape, generator=generator
            )
    return weights


def products(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is added to each weight, by module."""
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {name.removesuffix(ends[0]) for name in weights if name.endswith(ends[0])}
    return {
        name.removeprefix("transformer."): weights[name + ends[1]] @ weights[name + ends[0]]
        for name in names
    }


@torch.no_grad()
def merge(denoiser: torch.nn.Module, added: Mapping[str, Tensor], scale: float) -> None:
    """Adds them to the weights."""
    for name, product in added.items():
        weight = denoiser.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight += scale * product
