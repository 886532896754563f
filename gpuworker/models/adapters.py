"""LoRA adapters beside the weights of a denoiser, never merged into them.

Jobs with different adapters, and jobs without any, share one resident base and one forward: an
adapted linear layer adds `scale * up(down(x))` to the rows of those jobs alone.

    rows     0 none          1 style 0.8       2 style 0.8, detail -0.5
    output   base            base + style      base + style + detail

Files are read by diffusers' own converters, so that what is published for kohya's scripts, XLabs'
or ai-toolkit is known by the diffusers names of its layers. What stock pipelines would do beyond
linear layers of the denoiser (text encoders, DoRA, LoKr, norms) is refused by name.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin
from safetensors import safe_open
from torch import Tensor

from gpuworker.models.card import ModelRefused, ShapeRefused
from gpuworker.state import Fact, LatentState

_FACT = "lora."  # facts of a state: "lora.NAME" is the scale of that adapter
_KEPT = 8  # adapters on the device; the one that was used longest ago leaves first
CONVERTERS: Mapping[str, Any] = {"flux": FluxLoraLoaderMixin, "sd3": SD3LoraLoaderMixin}
_OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", ".lokr_", ".hada_")
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "transformer."
_HEADER = "lora_adapter_metadata"  # diffusers' own, in the header of a safetensors file


class LowRank(NamedTuple):
    """Of a linear layer: [rank, in], [out, rank], and alpha / rank."""

    down: Tensor
    up: Tensor
    scaling: float


class _Use(NamedTuple):
    """An adapter in one forward, for the rows that want it at one scale; None: all of them."""

    layers: Mapping[str, LowRank]
    scale: float
    rows: Tensor | None


class Adapters:
    """The adapters of one denoiser, by name. One thread uses it."""

    def __init__(self, family: str, files: Mapping[str, Path], denoiser: torch.nn.Module) -> None:
        self._family, self._files, self._denoiser = family, files, denoiser
        self._loaded: OrderedDict[str, Mapping[str, LowRank]] = OrderedDict()
        self._hooked: set[str] = set()
        self._uses: list[_Use] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Those that a job may name."""
        return tuple(sorted(self._files))

    def load(self, loras: Iterable[str]) -> None:
        """Has them beside the weights, by name. Raises `ModelRefused`."""
        for name in loras:
            self._layers(name)

    @contextmanager
    def of(self, states: Sequence[LatentState], device: torch.device) -> Iterator[None]:
        """A block in which forwards of the denoiser have these states' adapters, row by row."""
        rows: dict[tuple[str, float], list[int]] = {}
        for row, state in enumerate(states):
            for name, scale in state.facts.items():
                if name.startswith(_FACT):
                    assert isinstance(scale, float), (name, scale)
                    rows.setdefault((name.removeprefix(_FACT), scale), []).append(row)
        for (name, scale), places in sorted(rows.items()):
            some = None if len(places) == len(states) else torch.tensor(places, device=device)
            self._uses.append(_Use(self._layers(name), scale, some))
        try:
            yield
        finally:
            self._uses.clear()

    def _layers(self, name: str) -> Mapping[str, LowRank]:
        if name not in self._loaded:
            self._loaded[name] = self._read(name)
            if len(self._loaded) > _KEPT:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _read(self, name: str) -> Mapping[str, LowRank]:
        if name not in self._files:
            raise ModelRefused(f"loras/{name}", "this worker has no such file")
        modules = dict(self._denoiser.named_modules())
        layers = read_layers(self._files[name], self._family)
        placed = {}
        for module, layer in layers.items():
            base = modules.get(module)
            if not isinstance(base, torch.nn.Linear):
                raise ModelRefused(f"loras/{name}", f"{module} is no linear layer of the denoiser")
            shape = (layer.down.shape[1], layer.up.shape[0])
            if shape != (base.in_features, base.out_features):
                raise ModelRefused(f"loras/{name}", f"{module} has other sizes than {shape}")
            down, up = (w.to(base.weight.device, base.weight.dtype) for w in layer[:2])
            placed[module] = LowRank(down, up, layer.scaling)
            if module not in self._hooked:
                # Before the hooks that gather a layer's output from the members of a group.
                base.register_forward_hook(partial(self._add, module), prepend=True)
                self._hooked.add(module)
        return placed

    def _add(self, name: str, module: Any, given: tuple[Tensor], output: Tensor) -> Tensor:
        for layers, scale, rows in self._uses:
            if name not in layers:
                continue
            down, up, scaling = layers[name]
            mine = given[0] if rows is None else given[0].index_select(0, rows)
            linear = torch.nn.functional.linear
            added = linear(linear(mine, down), up) * (scale * scaling)
            output = output + added if rows is None else output.index_add(0, rows, added)
        return output


def adapter_facts(loras: Mapping[str, float]) -> dict[str, Fact]:
    """Facts of a state whose steps have these adapters. Raises `ShapeRefused`."""
    for name, scale in loras.items():
        if not math.isfinite(scale):
            raise ShapeRefused(f"loras.{name}", scale, "a finite number")
    return {_FACT + name: float(scale) for name, scale in sorted(loras.items())}


def read_layers(file: Path, family: str) -> dict[str, LowRank]:
    """The layers of an adapter's file, by the name of the linear layer. Raises `ModelRefused`."""
    part = f"loras/{file.stem}"
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {}).get(_HEADER, "{}"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        unknown = [name for name in weights if any(kind in name for kind in _OTHER_KINDS)]
        weights, alphas = ({}, {}) if unknown else _converted(weights, family)
    except Exception as error:  # whatever a broken file makes these libraries raise
        reason = f"cannot be read: {type(error).__name__}: {error}"
        raise ModelRefused(part, reason) from error
    unknown += [n for n in weights if not n.startswith(_PREFIX) or not n.endswith((_DOWN, _UP))]
    if unknown or not weights:
        reason = f"{unknown[0]} is unknown" if unknown else "it has no layers"
        raise ModelRefused(part, f"{reason}: only linear layers of the denoiser are supported")
    usual = Counter(alphas.values()).most_common(1)  # diffusers gives it to layers without one
    layers = {}
    for name in sorted(n.removesuffix(_DOWN) for n in weights if n.endswith(_DOWN)):
        if name + _UP not in weights:
            raise ModelRefused(part, f"{name}{_UP} is missing")
        module, down, up = name.removeprefix(_PREFIX), weights[name + _DOWN], weights[name + _UP]
        alpha = alphas.get(name, usual[0][0] if usual else None)
        scaling = _scaling(module, header, len(down)) if alpha is None else alpha / len(down)
        layers[module] = LowRank(down, up, scaling)
    return layers


def _converted(
    weights: dict[str, Tensor], family: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights, and alphas by layer, under diffusers' names."""
    if not CONVERTERS[family].__name__.startswith("Flux"):
        return CONVERTERS[family].lora_state_dict(weights), {}
    known, alphas = CONVERTERS[family].lora_state_dict(weights, return_alphas=True)
    named = {n.split(".lora_A.")[0].removesuffix(".alpha"): a for n, a in (alphas or {}).items()}
    return known, {name: float(alpha) for name, alpha in named.items()}


def _scaling(module: str, header: Mapping[str, Any], rank: int) -> float:
    """Of a layer whose file has no alpha for it: diffusers' header says it, or it is 1."""
    alpha = header.get(f"{_PREFIX}lora_alpha")
    for pattern, value in (header.get(f"{_PREFIX}alpha_pattern") or {}).items():
        named = pattern.lstrip("^")
        alpha = value if module == named or module.endswith("." + named) else alpha
    if alpha is None:
        return 1.0
    root = header.get(f"{_PREFIX}use_rslora")
    return float(alpha) / (math.sqrt(rank) if root else rank)
