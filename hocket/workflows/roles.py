"""What the workers of a model serve together: each holds the weights of some of its nodes."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from hocket.v1.generation_pb2 import ModelInfo
from hocket.workflows.catalogue import OPERATIONS

# By node of a model's plain chain: the operation that every worker with its weights offers.
ROLE_OPERATIONS = MappingProxyType({"text": "encode_prompt", "dit": "denoise", "vae": "decode"})


def missing_roles(model: ModelInfo) -> tuple[str, ...]:
    """Nodes of its plain chain that nobody serves. A worker that names no operations has all."""
    if not model.operations:
        return ()
    return tuple(role for role, op in ROLE_OPERATIONS.items() if op not in model.operations)


def lacks_role(model: ModelInfo, operation: str) -> bool:
    """Nobody has the weights that an operation of the model is called with."""
    return OPERATIONS[operation].part in missing_roles(model)


def together(infos: Iterable[ModelInfo]) -> dict[str, ModelInfo]:
    """By name, each model as all who serve it do together.

    Facts are those of the first; degrees and the batch are of who has the denoiser, if anybody.
    """
    found: dict[str, ModelInfo] = {}
    for info in infos:
        known = found.get(info.name)
        if known is None:
            found[info.name] = info
        elif known != info:
            found[info.name] = _merged(known, info)
    return found


def _merged(known: ModelInfo, info: ModelInfo) -> ModelInfo:
    steps = ROLE_OPERATIONS["dit"]
    leads = not known.operations or steps in known.operations or steps not in info.operations
    first, second = (known, info) if leads else (info, known)
    made = ModelInfo()
    made.CopyFrom(first)
    del made.operations[:], made.parts[:]
    if first.operations and second.operations:
        both = {*first.operations, *second.operations}
        made.operations.extend(op for op in ROLE_OPERATIONS.values() if op in both)
        made.operations.extend(sorted(both.difference(ROLE_OPERATIONS.values())))
    for part in (*first.parts, *second.parts):
        if part not in made.parts:
            made.parts.append(part)
    return made
