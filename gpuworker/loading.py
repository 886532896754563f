"""Models from diffusers folders: model_index.json says which classes, from_pretrained loads them.

A source is what folders/source.py takes. Components are loaded one by one and never as a pipeline
object: a card shares nothing between requests. What several models have in common is loaded once
(folders/identity.py says what that is). An optional card.json beside the index gives what diffusers
has no word for (sizes, examples, layout).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers

from gpuworker.folders.files import check_component, read_json, weight_files
from gpuworker.folders.identity import FileDigests, part_id
from gpuworker.folders.limits import limited
from gpuworker.folders.source import INDEX, LoadError, check_name, located
from gpuworker.memory.parts import PartId
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
from gpuworker.operations.names import ROLES
from gpuworker.prompts import texts_id
from hocket import loras

__all__ = ["LoadError", "distinct_bytes", "load_card"]

log = logging.getLogger(__name__)

_ADAPTERS = "loras"  # folder of LoRA adapters, a safetensors file each, beside the index
_HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
_NEEDED = ("transformer", "vae", "text_encoder", "scheduler")
_ALWAYS_FLOAT32 = ("AutoencoderKLWan",)  # as its authors run it
_TWO_STAGES = ("transformer_2", "boundary_ratio", "expand_timesteps")  # Wan 2.2
_NO_TEXT_SETTINGS = ("name", "examples", "adapters")  # of a card
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


def load_card(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    weights: WeightStore | None = None,
    digests: FileDigests | None = None,
    roles: Collection[str] = ROLES,
) -> ModelCard:
    """Loads a model onto `device` and returns its card.

    With a store, the weights are the store's, shared with the models that it has, and on the device
    when it says so; `digests` remembers what files were hashed. Of components for other nodes than
    `roles` the configuration alone is read: the card knows its facts, and cannot call them. Raises
    `LoadError`, `solvers.SolverRefused`, and `weights.BudgetTooSmall`.
    """
    source = located(asked)
    index, named = _components(asked, source.folder)
    for name in _TWO_STAGES:
        if name in named or index.get(name) not in (None, False, [None, None]):
            raise LoadError(asked, name, "two-stage models are not supported")
    if (pipeline := index.get("_class_name")) in _OTHER_PIPELINES:
        raise LoadError(asked, str(pipeline), "this pipeline is not supported")
    _check_index(asked, named)
    facts = source.folder / "card.json"
    card = read_json(asked, facts) if facts.exists() or facts.is_symlink() else {}
    adapters = sorted(source.folder.glob(f"{_ADAPTERS}/*.safetensors"))
    for file in adapters:
        if not loras.is_name(file.stem):
            part = f"{_ADAPTERS}/{file.name}"
            raise LoadError(asked, part, f"no request can name it so; allowed: {loras.NAMED_SO}")
    card |= {"pipeline": pipeline, "adapters": [str(file) for file in adapters]}
    model = source.name if source.named else str(card.get("name", source.name))
    check_name(asked, model)
    loading = _Loading(asked, model, device, dtype, weights, digests or FileDigests(), roles)
    found = {  # all of it is looked at before the first gigabyte is loaded
        name: loading.found(source.folder / name, library, class_name)
        for name, (library, class_name) in named.items()
    }
    parts = {name: loading.made(component) for name, component in found.items()}
    family = type(parts["transformer"]).__name__
    _check_family(asked, family)
    if family in _LATENTS_ALONE:
        _check_latents_alone(asked, parts)
    try:
        made = _FAMILIES[family](model, parts, card, device)
        made.facts = limited(made.facts, card)
    except ModelRefused as refused:
        raise LoadError(asked, refused.part, refused.reason) from refused
    if weights is not None:
        made.texts_id = texts_id(family, loading.text_settings(found, card))
    return made


def _check_index(source: str, named: Mapping[str, list[str]]) -> None:
    """All that the card will need is there by name."""
    family = named["transformer"][1] if "transformer" in named else ""
    for name in (*_NEEDED, *_ALSO_NEEDED.get(family, ())):
        if name not in named:
            raise LoadError(source, name, f"{INDEX} has no such component")
    if family != _OLD_NAME:
        _check_family(source, family)
    for name, (library, _) in named.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        if library == "transformers" and tokenizer not in named:
            raise LoadError(source, tokenizer, f"{INDEX} has no such component, but {name}")


def _check_family(source: str, family: str) -> None:
    if family not in _FAMILIES:
        raise LoadError(source, family, f"no family for it; known: {', '.join(_FAMILIES)}")


def distinct_bytes(
    sources: Sequence[str], digests: FileDigests, roles: Collection[str] = ROLES
) -> int:
    """Bytes of models' weights for these nodes as their files have them, files of the same content
    once. Raises `LoadError`.
    """
    sizes: dict[str, int] = {}
    for asked in sources:
        folder = located(asked).folder
        for name in [n for n in _components(asked, folder)[1] if _node(n) in roles]:
            for file in (folder / name).glob("*.safetensors"):
                if file.exists():  # what is missing is told when it is loaded
                    sizes[digests.of(file)] = file.stat().st_size
    return sum(sizes.values())


def _components(asked: str, folder: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The index, and the components that it names by library and class."""
    index = read_json(asked, folder / INDEX)
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and all(entry)}
    return index, named


def _node(component: str) -> str:
    """The node that a component's weights are for."""
    if component.startswith("text_encoder"):
        return "text"
    return "vae" if component == "vae" else "dit"


class _Component(NamedTuple):
    """A component of a folder."""

    path: Path
    kind: Any  # its class
    name: str  # library and class
    arguments: Mapping[str, Any]  # of from_pretrained
    dtype: torch.dtype | None = None  # of a module's weights
    files: tuple[Path, ...] = ()  # that they are read from
    is_blank: bool = False  # a module without weights: a node of another role is called with it


@dataclass(frozen=True)
class _Loading:
    """The components of one model, one by one."""

    asked: str
    model: str
    device: torch.device
    dtype: torch.dtype
    weights: WeightStore | None
    digests: FileDigests
    roles: Collection[str]

    def found(self, path: Path, library: str, class_name: str) -> _Component:
        """What is to be loaded; nothing is opened but JSON. Raises `LoadError`."""
        kind, name = self._kind(path, library, class_name), f"{library}.{class_name}"
        if not path.is_dir():
            raise LoadError(self.asked, path.name, f"{INDEX} names it, but the folder lacks it")
        check_component(self.asked, path)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            return _Component(path, kind, name, {})
        dtype = torch.float32 if class_name in _ALWAYS_FLOAT32 else self.dtype
        if _node(path.name) not in self.roles:
            return _Component(path, kind, name, {}, dtype, is_blank=True)
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        files, variant = weight_files(self.asked, path, stem, dtype)
        if variant is not None:
            log.info("%s: %s has no weights but %s", self.asked, path.name, variant)
        arguments = {"variant": variant, "use_safetensors": True, **_precision(kind, dtype)}
        return _Component(path, kind, name, arguments, dtype, files)

    def made(self, component: _Component) -> Any:
        """The component; a module's weights are the store's."""
        if component.dtype is None:
            return self._loaded(component)
        if component.is_blank:
            return self._blank(component)
        if self.weights is None:
            return self._module(component).to(self.device)
        part = self._part(component)
        module = self.weights.module(part)
        if module is None:
            module = self._module(component)
        node = (self.model, _node(component.path.name))
        self.weights.add(node, part, module, component.files)
        return module

    def text_settings(
        self, found: Mapping[str, _Component], card: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All that embeddings may hang on, beside a text: those of two models with the same are the
        same.
        """
        encoders = {name: self._part(each) for name, each in found.items() if _node(name) == "text"}
        tokenizers = {
            name: {file.name: self.digests.of(file) for file in _files_of(each.path)}
            for name, each in found.items()
            if name.startswith("tokenizer")
        }
        facts = {name: value for name, value in card.items() if name not in _NO_TEXT_SETTINGS}
        config = read_json(self.asked, found["transformer"].path / "config.json")
        told = {name: value for name, value in config.items() if not name.startswith("_")}
        where = [str(self.device), str(self.dtype)]
        return dict(encoders=encoders, tokenizers=tokenizers, card=facts, of=told, where=where)

    def _part(self, component: _Component) -> PartId:
        return part_id(
            component.name,
            read_json(self.asked, component.path / "config.json"),
            str(component.dtype),
            [self.digests.of(file) for file in component.files],
        )

    def _kind(self, path: Path, library: str, class_name: str) -> Any:
        if library not in _LIBRARIES and not library.startswith(_OUR_MODELS):
            what = f"{library}.{class_name}"
            raise LoadError(self.asked, what, "not a library that folders may name")
        try:
            module = importlib.import_module(library)
            kind = getattr(module, class_name)
        except (ImportError, AttributeError) as error:
            what, version = f"{library}.{class_name}", _version(library)
            raise LoadError(self.asked, what, f"{version} has no such class") from error
        if getattr(kind, "_keep_in_fp32_modules", None) and not _HAS_ACCELERATE:
            # diffusers loads float32 islands through accelerate only; in float32 there are none.
            if self.dtype != torch.float32:
                reason = f"the package accelerate is needed for {self.dtype}"
                raise LoadError(self.asked, path.name, reason)
            kind = type(class_name, (kind,), {"_keep_in_fp32_modules": None})
        return kind

    def _module(self, component: _Component) -> torch.nn.Module:
        """In evaluation mode, on the host."""
        module = self._loaded(component)
        if "torch_dtype" in component.arguments and module.dtype != component.dtype:
            # Without accelerate, diffusers takes the precision of a file whose first entry fits.
            module = module.to(component.dtype)
        made: torch.nn.Module = module.eval()
        return made

    def _blank(self, component: _Component) -> torch.nn.Module:
        """Of its configuration, on the meta device: shapes and types, and no memory."""
        kind, path = component.kind, component.path
        try:
            with torch.device("meta"):
                if issubclass(kind, diffusers.ModelMixin):
                    module = kind.from_config(kind.load_config(path))
                else:
                    module = kind(kind.config_class.from_pretrained(path))
        except Exception as error:  # as in `_loaded`
            reason = f"cannot be made without weights: {type(error).__name__}: {error}"
            raise LoadError(self.asked, path.name, reason) from error
        # Past diffusers' own, which warns of islands in float32.
        return torch.nn.Module.to(module, component.dtype).eval()

    def _loaded(self, component: _Component) -> Any:
        try:
            return component.kind.from_pretrained(component.path, **component.arguments)
        except Exception as error:  # whatever a broken folder makes these libraries raise
            reason = f"cannot be loaded: {type(error).__name__}: {error}"
            raise LoadError(self.asked, component.path.name, reason) from error


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _check_latents_alone(source: str, parts: dict[str, Any]) -> None:
    config, channels = parts["transformer"].config, parts["vae"].config.latent_channels
    if config.in_channels != channels:
        reason = f"{config.in_channels} for {channels} of latents: pictures as input are unknown"
        raise LoadError(source, "in_channels", reason)
    for name in ("ofs_embed_dim", "image_condition_type"):
        if config.get(name):
            raise LoadError(source, name, "pictures as input are not supported")


def _version(library: str) -> str:
    """A library's name, with its version where it has one."""
    known = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return f"{library} {known[library]}" if library in known else library


def _precision(kind: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for a module's from_pretrained, whose names differ between the two libraries."""
    if issubclass(kind, diffusers.ModelMixin):
        return {"torch_dtype": dtype, "low_cpu_mem_usage": _HAS_ACCELERATE}
    return {"dtype": dtype}
