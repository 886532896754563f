"""A model as a request may count on it, whichever of its workers run the request.

Workers of one model may differ in what is beside its weights: an adapter that was copied to one
host alone, a folder without the ControlNet. Only what all of them have is offered.
"""

from __future__ import annotations

from collections.abc import Sequence

from hocket.v1.generation_pb2 import ModelInfo


def common(models: Sequence[ModelInfo]) -> ModelInfo:
    """The first of one model's infos, without the adapters and ports that another worker lacks.

    `models` is not empty, and not changed.
    """
    first, others = models[0], models[1:]
    adapters = [name for name in first.adapters if all(name in m.adapters for m in others)]
    operations = [
        name
        for name in first.operations
        if not any(_lacks_port(name, other.operations) for other in others)
    ]
    if len(adapters) == len(first.adapters) and len(operations) == len(first.operations):
        return first
    found = ModelInfo()
    found.CopyFrom(first)
    found.adapters[:], found.operations[:] = adapters, operations
    return found


def _lacks_port(name: str, operations: Sequence[str]) -> bool:
    """Whether a worker does an operation and does not take the port of it that is named."""
    operation, dot, _ = name.partition(".")
    return bool(dot) and operation in operations and name not in operations
