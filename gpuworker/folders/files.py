"""Which files of a component are its weights, and whether they are what they say.

    NAME.safetensors                            whole
    NAME.safetensors.index.json, its shards     sharded
    NAME.VARIANT.safetensors …                  either, of another precision

The plain form is taken where there is one, or else the variant that is nearest to the precision
wanted. Weights that lie in pickles alone are refused: to open one is to run what it says.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpuworker.folders.source import LoadError

_WHOLE = re.compile(r"(?:\.(?P<variant>[\w-]+))?\.safetensors")
_INDEX = re.compile(
    r"(?:\.(?P<first>[\w-]+))?\.safetensors(?:\.(?P<middle>[\w-]+))?"
    r"\.index(?:\.(?P<last>[\w-]+))?\.json"
)
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (*_PICKLES, ".safetensors", ".msgpack", ".h5", ".gguf", ".onnx", ".onnx_data")
_NEAREST = {
    torch.float32: ("fp32", "fp16", "bf16"),
    torch.bfloat16: ("bf16", "fp16", "fp32"),
    torch.float16: ("fp16", "bf16", "fp32"),
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES_MAX = 1024
_SHOWN_MAX = 5

_Forms = Mapping[str | None, str]  # by variant: the file's name


class WeightFiles(NamedTuple):
    """The files that a component's weights are read from."""

    files: tuple[Path, ...]  # by name
    variant: str | None  # None: the plain ones


def weight_files(asked: str, component: Path, stem: str, dtype: torch.dtype) -> WeightFiles:
    """Of a component whose library calls its weights `stem`. Raises `LoadError`."""
    names = _names(component)
    whole, sharded = _forms(names, stem)
    variants = {*whole, *sharded}
    if not variants:
        raise LoadError(asked, component.name, _nothing(names, stem))
    variant = _variant(asked, component, variants, dtype)
    # The two libraries prefer different ones where both are there.
    in_shards = variant in sharded and (variant not in whole or stem != "model")
    if not in_shards:
        files: tuple[Path, ...] = (component / whole[variant],)
    else:
        files = _shards(asked, component / sharded[variant])
    for file in files:
        check_file(asked, file)
    return WeightFiles(files, variant)


def check_component(asked: str, component: Path) -> None:
    """Configurations, vocabularies and the like are there. Raises `LoadError`."""
    for name in _names(component):
        if not name.endswith(_WEIGHTS) and not (component / name).is_dir():
            check_file(asked, component / name)


def check_file(asked: str, file: Path) -> None:
    """It is there, and not something that stands for it. Raises `LoadError`."""
    name = f"{file.parent.name}/{file.name}"
    if file.is_symlink() and not file.exists():
        reason = f"a dangling link to {os.readlink(file)}: what it stands for was never fetched"
        raise LoadError(asked, name, reason)
    if file.stat().st_size <= _POINTER_BYTES_MAX and file.read_bytes().startswith(_POINTER):
        raise LoadError(asked, name, "a Git LFS pointer, not the file: run `git lfs pull`")


def read_json(asked: str, path: Path) -> dict[str, Any]:
    """A file with one JSON object. Raises `LoadError`."""
    try:
        if path.is_symlink() or path.exists():
            check_file(asked, path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(asked, path.name, "the folder has no such file") from error
    except ValueError as error:
        raise LoadError(asked, path.name, f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(asked, path.name, "not a JSON object")
    return content


def _names(component: Path) -> list[str]:
    return sorted(os.listdir(component))  # dangling links too


def _forms(names: list[str], stem: str) -> tuple[_Forms, _Forms]:
    """By variant: the file with everything, the index of shards."""
    whole: dict[str | None, str] = {}
    sharded: dict[str | None, str] = {}
    for name in names:
        if not name.startswith(stem) or _SHARD.fullmatch(name):
            continue
        if found := _WHOLE.fullmatch(name, len(stem)):
            whole[found["variant"]] = name
        elif found := _INDEX.fullmatch(name, len(stem)):
            sharded[found["first"] or found["middle"] or found["last"]] = name
    return whole, sharded


def _variant(
    asked: str, component: Path, variants: set[str | None], dtype: torch.dtype
) -> str | None:
    """The plain form, or the only variant, or the one of the nearest precision."""
    if None in variants or len(variants) == 1:
        return None if None in variants else next(iter(variants))
    for variant in _NEAREST.get(dtype, ()):
        if variant in variants:
            return variant
    found = ", ".join(sorted(str(v) for v in variants))
    reason = f"only variants, and none of a known precision: {found}"
    raise LoadError(asked, component.name, f"{reason}; allowed: fp32, bf16, fp16, or no variant")


def _shards(asked: str, index: Path) -> tuple[Path, ...]:
    placed = read_json(asked, index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise LoadError(asked, f"{index.parent.name}/{index.name}", "it has no weight_map")
    shards = sorted({str(name) for name in placed.values()})
    for name in shards:
        shard = index.parent / name
        if shard.parent != index.parent or not (shard.is_symlink() or shard.exists()):
            reason = f"{index.name} names this shard, but the folder lacks it"
            raise LoadError(asked, f"{index.parent.name}/{name}", reason)
    return tuple(index.parent / name for name in shards)


def _nothing(names: list[str], stem: str) -> str:
    """Why a component has no weights."""
    wanted = f"no {stem}.safetensors"
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        found = ", ".join(pickles[:_SHOWN_MAX])
        return (
            f"{wanted}, only pickled weights ({found}), which may run code when they are opened; "
            "convert them to safetensors"
        )
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return f"{wanted} and no index of its shards ({', '.join(shards[:_SHOWN_MAX])})"
    if others := [name for name in names if name.endswith(_WEIGHTS)]:
        return f"{wanted}; found {', '.join(others[:_SHOWN_MAX])}"
    return f"{wanted}: its weights are missing"
