"""Step times of a published size, ours and plain diffusers', in alternating pairs over one set of
weights; peak memory; decode times.

Both sides make the same steps of the same jobs, so that their latents can be compared at the end.
"""

from __future__ import annotations

import gc
import itertools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpuworker.measuring.plain import plain_loop
from gpuworker.measuring.record import Cell, MeasurementLog
from gpuworker.measuring.sizes import MediaSize, Size, built, twin
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.state import LatentState
from hocket.clock import steady_ns

WARM_STEPS = 2
PAIRS_MIN = 3


def measure_steps(
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    record: MeasurementLog,
    pairs: int,
    cell_s: float,
    backend: str,
) -> None:
    """Every cell of a size: shapes and batches, as written and compiled; then decodes."""
    bench = _Bench(size, device, dtype, pairs, cell_s, backend)
    # A larger batch that would not fit after a smaller one that did not is not tried.
    full: dict[tuple[str, str], int] = {}
    for cell in record.wanted(cells(size)):
        place = (str(cell["compile"]), str(cell["shape"]))
        if int(cell["batch"]) > full.get(place, 1 << 30):
            record.add(cell, out_of_memory=True, tried=False)
            continue
        try:
            record.add(cell, **bench.cell(cell))
        except torch.OutOfMemoryError as error:
            full[place] = int(cell["batch"])
            record.add(cell, out_of_memory=True, tried=True, told=str(error)[:200])
        except Exception as error:  # a cell that fails must not cost the others
            traceback.print_exc()
            record.add(cell, error=f"{type(error).__name__}: {error}"[:400])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def cells(size: Size) -> list[Cell]:
    """In the order in which they are measured: cheap shapes first, as written before compiled."""
    found: list[Cell] = []
    for compiled, shape, batch in itertools.product(("off", "default"), size.shapes, size.batches):
        found.append(_cell(size, "dit", shape, compiled, batch))
    return found + [_cell(size, "vae", shape, "off", 1) for shape in size.shapes]


def _cell(size: Size, node: str, shape: MediaSize, compiled: str, batch: int) -> Cell:
    return {
        "model": size.name,
        "node": node,
        "shape": str(shape),
        "width": shape.width,
        "height": shape.height,
        "frames": shape.frames,
        "compile": compiled,
        "batch": batch,
    }


class _Bench:
    """One model on one device, and the plain twin over its weights."""

    def __init__(
        self,
        size: Size,
        device: torch.device,
        dtype: torch.dtype,
        pairs: int,
        cell_s: float,
        backend: str,
    ) -> None:
        self._size, self._device = size, device
        self._pairs, self._cell_s, self._backend = pairs, cell_s, backend
        self._card = built(size, device, dtype)
        self._twin = twin(self._card.transformer)
        self._weights_bytes = sum(
            p.numel() * p.element_size() for p in self._card.transformer.parameters()
        )
        self._compiled = False

    def cell(self, cell: Cell) -> dict[str, Any]:
        """What is measured in a cell."""
        if cell["compile"] == "default" and not self._compiled:
            self._card.compile(self._backend)
            self._twin.compile_repeated_blocks(backend=self._backend)
            self._compiled = True
        shape = MediaSize(int(cell["width"]), int(cell["height"]), int(cell["frames"]))
        if cell["node"] == "vae":
            return self._decodes(shape)
        return self._pairs_of_steps(shape, int(cell["batch"]))

    def _first(self, shape: MediaSize, seed: int, steps: int) -> LatentState:
        guidance = self._size.guidance
        return self._card.encode("measured", "", *shape, steps, guidance, seed)

    def _pairs_of_steps(self, shape: MediaSize, batch: int) -> dict[str, Any]:
        steps = WARM_STEPS + self._pairs
        first = [self._first(shape, seed, steps) for seed in range(batch)]
        ours, plain = (
            _Ours(self._card, first),
            plain_loop(self._twin, self._size.scheduler(), first),
        )
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        first_us = timed_us(self._device, ours.step)
        peak_bytes = _peak_bytes(self._device)
        plain.step()
        for _ in range(WARM_STEPS - 1):
            ours.step()
            plain.step()
        ours_us: list[int] = []
        plain_us: list[int] = []
        began_ns = steady_ns()
        for turn in range(self._pairs):
            sides = [(ours.step, ours_us), (plain.step, plain_us)]
            for step, times in sides if turn % 2 else reversed(sides):
                times.append(timed_us(self._device, step))
            if len(ours_us) >= PAIRS_MIN and steady_ns() - began_ns > self._cell_s * 1e9:
                break
        return {
            "ours_us": ours_us,
            "plain_us": plain_us,
            "first_us": first_us,
            "peak_bytes": peak_bytes,
            "weights_bytes": self._weights_bytes,
            **compared(ours.latents, plain.latents),
        }

    def _decodes(self, shape: MediaSize) -> dict[str, Any]:
        state = self._first(shape, 0, 1)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        times = [timed_us(self._device, lambda: self._card.decode(state)) for _ in range(4)]
        return {"ours_us": times[1:], "peak_bytes": _peak_bytes(self._device)}


class _Ours:
    """A batch of jobs under way, as the engine makes their steps."""

    def __init__(self, card: DiffusersCard, states: list[LatentState]) -> None:
        self._card, self._states = card, states

    def step(self) -> Tensor:
        self._states = self._card.step(self._states, None)
        return self._states[0].tensors["latents"]

    @property
    def latents(self) -> Tensor:
        return torch.cat([state.tensors["latents"] for state in self._states])


def timed_us(device: torch.device, work: Callable[[], Any]) -> int:
    """Between two events of the stream where there is one, launches included; else by the clock."""
    if device.type != "cuda":
        began_ns = steady_ns()
        work()
        return (steady_ns() - began_ns) // 1000
    torch.cuda.synchronize(device)
    start: Any = torch.cuda.Event(enable_timing=True)
    end: Any = torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return int(start.elapsed_time(end) * 1000)


def compared(ours: Tensor, plain: Tensor) -> dict[str, Any]:
    """How far two results are apart, on their scale."""
    a, b = ours.float(), plain.float()
    return {
        "finite": bool(a.isfinite().all()),
        "difference": float((a - b).abs().max()),
        "scale": float(b.abs().max()),
    }


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
