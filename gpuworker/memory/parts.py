"""A part: the weights of one component, which nodes of one or several models use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpuworker.executor import SideNote
from gpuworker.memory.host_copies import HostCopy

NodeName = tuple[str, str]  # model, node
PartId = str


class PartFact(NamedTuple):
    """A part as others see it."""

    part: PartId
    nodes: tuple[NodeName, ...]  # that use it
    size_bytes: int
    load_us: int
    resident: bool


@dataclass
class WeightPart:
    """A component's module, and where its weights are while they are away."""

    id: PartId
    module: nn.Module
    size_bytes: int
    nodes: list[NodeName] = field(default_factory=list)  # that use it, the first one names it
    copy: HostCopy | None = None  # None: it never leaves
    load_us: int = 0
    arrival: SideNote | None = None  # of its last load, until somebody used it

    @property
    def name(self) -> str:
        """For people."""
        return "/".join(self.nodes[0])

    @property
    def fixed_bytes(self) -> int:
        """Of what stays on the device while the part is away."""
        return self.copy.fixed_bytes if self.copy is not None else 0

    def fill(self) -> list[Tensor]:
        assert self.copy is not None, "what never leaves never comes"
        return self.copy.fill()

    def install(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self.module.parameters(), tensors, strict=True):
            parameter.data = tensor

    def drop(self, device: torch.device) -> None:
        for parameter in self.module.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)
