"""Where weights are while they are not on the device, and how they come back, to the bit.

On a CPU the copy is the component's own files: of each tensor it is known which entry of which
safetensors file has the same content, so that coming back means to read that entry, and being away
costs no memory. On CUDA it is one block of page-locked host memory, from which one transfer on a
stream of its own brings everything back while the compute stream goes on.

Modules stay where they are, with their hooks and buffers (which are small); what comes and goes is
the content of their parameters. Filling runs in the loader's thread and shares nothing with a step:
no library's from_pretrained, which may change process-wide defaults while it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

log = logging.getLogger(__name__)

_LINE_BYTES = 64
_ALIGNED_BYTES = 256  # a tensor's place in a block suits every type


class HostCopy(Protocol):
    """The weights of a part, away from the device."""

    fixed_bytes: int  # of what has no copy and therefore never leaves

    def fill(self) -> list[Tensor]:
        """New tensors on the device, in the order of the parameters; blocks until they are there.

        Called from the loader's thread, one at a time.
        """


class _Place(NamedTuple):
    """An entry of a safetensors file."""

    file: Path
    key: str


class FileCopy:
    """Weights that are read again from their safetensors files."""

    def __init__(self, module: nn.Module, files: Sequence[Path]) -> None:
        entries = _entries(files)
        self._forms: list[tuple[torch.dtype, int]] = []  # type, where it lay in a cache line
        self._places: dict[Path, list[tuple[int, str]]] = {}
        self._kept: dict[int, Tensor] = {}
        for number, (name, parameter) in enumerate(module.named_parameters()):
            self._forms.append((parameter.dtype, parameter.data_ptr() % _LINE_BYTES))
            place = _find(name, parameter.detach(), entries)
            if place is None:
                self._kept[number] = parameter.detach()
            else:
                self._places.setdefault(place.file, []).append((number, place.key))
        self.fixed_bytes = sum(tensor.nbytes for tensor in self._kept.values())
        if self.fixed_bytes:
            names = ", ".join(map(str, files))
            log.warning("%d bytes of the weights are in none of %s", self.fixed_bytes, names)

    def fill(self) -> list[Tensor]:
        found = dict(self._kept)
        for file, entries in self._places.items():
            with safe_open(file, framework="pt") as opened:
                for number, key in entries:
                    found[number] = _copied(opened.get_tensor(key), *self._forms[number])
        return [found[number] for number in range(len(self._forms))]


class PinnedCopy:
    """Weights in page-locked host memory. For CUDA; not yet run on a device."""

    fixed_bytes = 0

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._views: list[tuple[int, int, torch.dtype, torch.Size]] = []
        parameters = [parameter.detach() for parameter in module.parameters()]
        size = 0
        for tensor in parameters:
            self._views.append((size, tensor.nbytes, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self._block = torch.empty(size, dtype=torch.uint8)
        for tensor, view in zip(parameters, self._cut(self._block), strict=True):
            view.copy_(tensor)
        # Not pin_memory(), which rounds up to a power of two.
        outcome = torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), size, 0)
        torch.cuda.check_error(outcome)

    def fill(self) -> list[Tensor]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            block = self._block.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        arrived.synchronize()  # this thread alone waits; the compute stream goes on
        return self._cut(block)

    def _cut(self, block: Tensor) -> list[Tensor]:
        return [
            block[start : start + size].view(dtype).view(shape)
            for start, size, dtype, shape in self._views
        ]


def _copied(read: Tensor, dtype: torch.dtype, place: int) -> Tensor:
    """A tensor of its own (what is read is mapped to the file), at the same place in a cache line.

    The CPU's kernels round differently for tensors that lie differently: with this, a worker whose
    weights come and go makes the very bits of one that keeps them.
    """
    size = read.numel() * dtype.itemsize
    block = torch.empty(size + _LINE_BYTES, dtype=torch.uint8)
    start = (place - block.data_ptr()) % _LINE_BYTES
    copy = block[start : start + size].view(dtype).view(read.shape)
    return copy.copy_(read)


def _entries(files: Sequence[Path]) -> Mapping[tuple[int, ...], Sequence[_Place]]:
    """What lies in safetensors files, by shape."""
    found: dict[tuple[int, ...], list[_Place]] = {}
    for file in sorted(files):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                shape = tuple(opened.get_slice(key).get_shape())
                found.setdefault(shape, []).append(_Place(file, key))
    return found


def _find(
    name: str, tensor: Tensor, entries: Mapping[tuple[int, ...], Sequence[_Place]]
) -> _Place | None:
    """The entry of the tensor's content: that of its name first, but libraries rename."""
    for place in sorted(entries.get(tuple(tensor.shape), ()), key=lambda p: p.key != name):
        with safe_open(place.file, framework="pt") as opened:
            if torch.equal(opened.get_tensor(place.key).to(tensor.dtype), tensor):
                return place
    return None
