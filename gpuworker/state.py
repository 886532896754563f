"""The state of a denoise job between two steps: one immutable value that travels between workers.

A step returns a new state and leaves the old one alone. That is what makes the redo of a lost step
exact: whoever still holds the state after step k can make step k+1 again, bit for bit. The blob is
a safetensors file whose header carries the plain facts as JSON, so that any tool can open one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

Fact = str | int | float | bool | None

_HEADER_KEY = "hocket"
_HEADER_LENGTH_BYTES = 8  # safetensors opens with the header's size as a little-endian u64


class StateCorrupt(Exception):
    """A blob that is not a latent state.

    Fields: `reason`, what was wrong with it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a latent state: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class LatentState:
    """A denoise job after `steps_done` of its `steps_total` steps.

    `tensors` holds "latents" and whatever else the family's step needs (embeddings, position ids,
    scheduler history); `facts` the plain settings (width, height, frames, guidance_scale, seed …).
    """

    tensors: Mapping[str, Tensor]
    steps_done: int
    steps_total: int
    facts: Mapping[str, Fact]

    @property
    def finished(self) -> bool:
        """Whether the job is ready to be decoded."""
        return self.steps_done >= self.steps_total

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def advanced(
        self,
        latents: Tensor,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Fact] | None = None,
    ) -> LatentState:
        """The state one step later, with new latents; what is not named is shared with this one."""
        assert not self.finished, "a finished job has no next step"
        assert latents.shape == self.tensors["latents"].shape, "a step keeps the shape"
        return replace(
            self,
            tensors={**self.tensors, **(tensors or {}), "latents": latents},
            steps_done=self.steps_done + 1,
            facts={**self.facts, **(facts or {})},
        )

    def to(self, device: torch.device | str) -> LatentState:
        """The same state with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)

    def to_bytes(self) -> bytes:
        """The state as a safetensors blob; the same state gives the same bytes."""
        header = {"done": self.steps_done, "total": self.steps_total, "facts": dict(self.facts)}
        tensors = {
            name: tensor.detach().to("cpu").contiguous() for name, tensor in self.tensors.items()
        }
        return save(tensors, metadata={_HEADER_KEY: json.dumps(header, sort_keys=True)})

    @classmethod
    def from_bytes(cls, blob: bytes, device: torch.device | str = "cpu") -> LatentState:
        """Reads what `to_bytes` wrote; the tensors own their memory. Raises `StateCorrupt`."""
        try:
            length = int.from_bytes(blob[:_HEADER_LENGTH_BYTES], "little")
            raw = json.loads(blob[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
            header = json.loads(raw["__metadata__"][_HEADER_KEY])
            tensors = {name: tensor.to(device) for name, tensor in sorted(load(blob).items())}
            return cls(tensors, header["done"], header["total"], header["facts"])
        except Exception as error:  # safetensors' error is a bare Exception subclass of its own
            raise StateCorrupt(f"{type(error).__name__}: {error}") from error
