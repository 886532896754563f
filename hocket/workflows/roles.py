"""What the workers of a model serve together: each holds the weights of some of its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    Facts are those of the first; degrees and the batch are of who has the denoiser, if anybody. Of
    ports and adapters only those are told that all who run the operation have: a request may run
    on any of them.
    """
    workers: dict[str, list[ModelInfo]] = {}
    for info in infos:
        workers.setdefault(info.name, []).append(info)
    return {name: _joined(each) for name, each in workers.items()}


def _joined(infos: Sequence[ModelInfo]) -> ModelInfo:
    first = infos[0]
    if all(info == first for info in infos[1:]):
        return first
    leads = next((info for info in infos if _does(info, ROLE_OPERATIONS["dit"])), first)
    made = ModelInfo()
    made.CopyFrom(leads)
    del made.operations[:], made.parts[:], made.adapters[:]
    if all(info.operations for info in infos):
        known = {op for info in infos for op in info.operations}
        shared = {op for op in known if all(op in i.operations for i in infos if _runs(i, op))}
        made.operations.extend(op for op in ROLE_OPERATIONS.values() if op in shared)
        made.operations.extend(sorted(shared.difference(ROLE_OPERATIONS.values())))
    for part in (part for info in (leads, *infos) for part in info.parts):
        if part not in made.parts:
            made.parts.append(part)
    denoise = [info for info in infos if _does(info, ROLE_OPERATIONS["dit"])]
    made.adapters.extend(n for n in leads.adapters if all(n in i.adapters for i in denoise))
    return made


def _does(info: ModelInfo, operation: str) -> bool:
    return not info.operations or operation in info.operations


def _runs(info: ModelInfo, operation: str) -> bool:
    """It does the operation whose port that may be."""
    base, dot, _ = operation.partition(".")
    return base in info.operations if dot else operation in info.operations
