"""Models from diffusers folders: model_index.json says which classes, from_pretrained loads them.

A source is a folder, or a hub id that is first brought into huggingface_hub's cache. Components are
loaded one by one and never as a pipeline object: a card shares nothing between requests. An
optional card.json beside the index gives what diffusers has no word for (sizes, examples, layout).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download

from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import ModelCard, ModelRefused
from gpuworker.models.cogvideox import CogVideoXCard
from gpuworker.models.flux import FluxCard, WordFluxCard
from gpuworker.models.hunyuan_video import HunyuanVideoCard
from gpuworker.models.ltx import LTXCard
from gpuworker.models.pixart import PixArtCard
from gpuworker.models.qwen import QwenCard
from gpuworker.models.sd3 import SD3Card
from gpuworker.models.wan import WanCard
from gpuworker.models.word_motion import WordMotionCard

_INDEX = "model_index.json"
_ADAPTERS = "loras"  # folder of LoRA adapters, a safetensors file each, beside the index
_HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
_NEEDED = ("transformer", "vae", "text_encoder", "scheduler")
_ALWAYS_FLOAT32 = ("AutoencoderKLWan",)  # as its authors run it
_TWO_STAGES = ("transformer_2", "boundary_ratio", "expand_timesteps")  # Wan 2.2
_LIBRARIES = ("diffusers", "transformers")
_OUR_MODELS = "gpuworker.models."  # a folder may name our own classes, nobody else's


def _flux_card(
    name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
) -> FluxCard:
    """Of a Flux folder, by its text encoder and by whether it makes clips."""
    words = hasattr(parts["text_encoder"], "resolve")
    kind = (WordMotionCard if "frames" in card else WordFluxCard) if words else FluxCard
    return kind(name, parts, card, device)


_FAMILIES: Mapping[str, Callable[[str, dict[str, Any], dict[str, Any], torch.device], ModelCard]]
_FAMILIES = {
    "FluxTransformer2DModel": _flux_card,
    "CogVideoXTransformer3DModel": CogVideoXCard,
    "HunyuanVideoTransformer3DModel": HunyuanVideoCard,
    "LTXVideoTransformer3DModel": LTXCard,
    "PixArtTransformer2DModel": PixArtCard,
    "QwenImageTransformer2DModel": QwenCard,
    "SD3Transformer2DModel": SD3Card,
    "WanTransformer3DModel": WanCard,
}
_OLD_NAME = "Transformer2DModel"  # an index may say so; diffusers loads today's class for it
_OTHER_PIPELINES = ("PixArtAlphaPipeline",)  # of a transformer that we know
_ALSO_NEEDED: Mapping[str, tuple[str, ...]] = {"SD3Transformer2DModel": ("text_encoder_2",)}
# Other models of these classes also take a picture.
_LATENTS_ALONE = ("CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel")


class LoadError(Exception):
    """A model that cannot be loaded.

    Fields: `source`, `missing` (the file, component or class at fault), `reason`.
    """

    def __init__(self, source: str, missing: str, reason: str) -> None:
        super().__init__(f"{source}: {missing}: {reason}")
        self.source, self.missing, self.reason = source, missing, reason


def load_card(
    folder_or_id: str,
    device: torch.device,
    dtype: torch.dtype,
    weights: WeightStore | None = None,
) -> ModelCard:
    """Loads a model onto `device` and returns its card, which is named like the folder.

    With a store, the weights are the store's, and on the device when it says so. Raises
    `LoadError`, `solvers.SolverRefused`, and `weights.BudgetTooSmall`.
    """
    folder = _folder(folder_or_id)
    index = _json(folder_or_id, folder / _INDEX)
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and all(entry)}
    for name in _TWO_STAGES:
        if name in named or index.get(name) not in (None, False, [None, None]):
            raise LoadError(folder_or_id, name, "two-stage models are not supported")
    if (pipeline := index.get("_class_name")) in _OTHER_PIPELINES:
        raise LoadError(folder_or_id, str(pipeline), "this pipeline is not supported")
    _check_index(folder_or_id, named)
    card = _json(folder_or_id, folder / "card.json") if (folder / "card.json").exists() else {}
    adapters = sorted(folder.glob(f"{_ADAPTERS}/*.safetensors"))
    card |= {"pipeline": pipeline, "adapters": [str(file) for file in adapters]}
    model = str(card.get("name", folder_or_id.rstrip("/").rsplit("/", 1)[-1]))
    parts: dict[str, Any] = {}
    for name, (library, class_name) in named.items():
        part = _component(folder_or_id, folder / name, library, class_name, dtype)
        if isinstance(part, torch.nn.Module):
            if weights is not None:
                weights.add((model, _node(name)), part, folder / name)
            else:
                part.to(device)
        parts[name] = part
    family = type(parts["transformer"]).__name__
    _check_family(folder_or_id, family)
    if family in _LATENTS_ALONE:
        _check_latents_alone(folder_or_id, parts)
    try:
        return _FAMILIES[family](model, parts, card, device)
    except ModelRefused as refused:
        raise LoadError(folder_or_id, refused.part, refused.reason) from refused


def _check_index(source: str, named: Mapping[str, list[str]]) -> None:
    """All that the card will need is there by name."""
    family = named["transformer"][1] if "transformer" in named else ""
    for name in (*_NEEDED, *_ALSO_NEEDED.get(family, ())):
        if name not in named:
            raise LoadError(source, name, f"{_INDEX} has no such component")
    if family != _OLD_NAME:
        _check_family(source, family)
    for name, (library, _) in named.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        if library == "transformers" and tokenizer not in named:
            raise LoadError(source, tokenizer, f"{_INDEX} has no such component, but {name}")


def _check_family(source: str, family: str) -> None:
    if family not in _FAMILIES:
        raise LoadError(source, family, f"no family for it; known: {', '.join(_FAMILIES)}")


def _folder(source: str) -> Path:
    local = Path(source)
    if local.is_dir():
        return local
    if local.is_absolute() or source.count("/") != 1:
        raise LoadError(source, source, "no such folder, and not a hub id (owner/name)")
    try:
        return Path(snapshot_download(source))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        raise LoadError(source, source, f"cannot be fetched from the hub: {error}") from error


def _json(source: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(source, path.name, "the folder has no such file") from error
    except ValueError as error:
        raise LoadError(source, path.name, f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(source, path.name, "not a JSON object")
    return content


def folder_bytes(folder_or_id: str) -> int:
    """Bytes of a model's weights as its files have them. Raises `LoadError`."""
    files = _folder(folder_or_id).glob("*/*.safetensors")
    return sum(file.stat().st_size for file in files if file.parent.name != _ADAPTERS)


def _node(component: str) -> str:
    """The node that a component's weights are for."""
    if component.startswith("text_encoder"):
        return "text"
    return "vae" if component == "vae" else "dit"


def _component(source: str, path: Path, library: str, class_name: str, dtype: torch.dtype) -> Any:
    """One component, by its class; modules in evaluation mode on the host."""
    if library not in _LIBRARIES and not library.startswith(_OUR_MODELS):
        raise LoadError(source, f"{library}.{class_name}", "not a library that folders may name")
    try:
        kind = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise LoadError(source, f"{library}.{class_name}", "no such class here") from error
    if not path.is_dir():
        raise LoadError(source, path.name, f"{_INDEX} names it, but the folder lacks it")
    if getattr(kind, "_keep_in_fp32_modules", None) and not _HAS_ACCELERATE:
        # diffusers loads float32 islands through accelerate only; in float32 there are none.
        if dtype != torch.float32:
            raise LoadError(source, path.name, f"the package accelerate is needed for {dtype}")
        kind = type(class_name, (kind,), {"_keep_in_fp32_modules": None})
    precision = _precision(kind, class_name, dtype)
    try:
        part = kind.from_pretrained(path, **precision)
    except Exception as error:  # whatever a broken folder makes these libraries raise
        reason = f"{type(error).__name__}: {error}"
        raise LoadError(source, path.name, f"cannot be loaded: {reason}") from error
    if "torch_dtype" in precision and part.dtype != precision["torch_dtype"]:
        # Without accelerate, diffusers takes the precision of a file whose first entry fits.
        part = part.to(precision["torch_dtype"])
    return part.eval() if isinstance(part, torch.nn.Module) else part


def _check_latents_alone(source: str, parts: dict[str, Any]) -> None:
    config, channels = parts["transformer"].config, parts["vae"].config.latent_channels
    if config.in_channels != channels:
        reason = f"{config.in_channels} for {channels} of latents: pictures as input are unknown"
        raise LoadError(source, "in_channels", reason)
    for name in ("ofs_embed_dim", "image_condition_type"):
        if config.get(name):
            raise LoadError(source, name, "pictures as input are not supported")


def _precision(kind: Any, class_name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for from_pretrained, whose names differ between the two libraries."""
    dtype = torch.float32 if class_name in _ALWAYS_FLOAT32 else dtype
    if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin):
        return {"torch_dtype": dtype, "low_cpu_mem_usage": _HAS_ACCELERATE}
    if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
        return {"dtype": dtype}
    return {}
