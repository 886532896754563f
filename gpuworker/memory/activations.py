"""What each kind of call takes beside the weights: estimated by the card, until it is measured, and
raised when an allocation failed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from gpuworker.models.card import ModelCard
from gpuworker.models.footprint import ModelCall
from gpuworker.operations.names import part_of

_CALLS_MAX = 4096  # remembered; the oldest are forgotten first
_RAISED_BY = 1.5  # where a failed allocation did not say what it had asked for


class Activations:
    """Thread-safe: the agent asks, the compute thread measures."""

    def __init__(self, cards: Mapping[str, ModelCard], device: torch.device) -> None:
        self._cards = cards
        self._device = device
        self._lock = threading.Lock()
        self._known: dict[tuple[str, ModelCall], int] = {}  # of calls that were asked for

    def bytes_of(self, model: str, call: ModelCall) -> int:
        """What a call takes, as far as is known."""
        with self._lock:
            known = self._known.get((model, call))
        if known is not None:
            return known
        estimate = self._cards[model].activation_bytes(call)
        self._learn(model, call, estimate)
        return estimate

    def largest(self, model: str, node: str) -> int:
        """Of the calls asked for; before the first, of one at the model's default shape."""
        with self._lock:
            known = [
                size_bytes
                for (m, call), size_bytes in self._known.items()
                if m == model and part_of(call.node) == node
            ]
        if known:
            return max(known)
        facts = self._cards[model].facts
        width, height = facts.size_default
        call = ModelCall(node, width, height, facts.frames_default)
        return self._cards[model].activation_bytes(call)

    @contextmanager
    def measured(self, model: str, call: ModelCall) -> Iterator[None]:
        """Learns from what a call takes at its peak; on a CPU nothing tells."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        moved = abs(torch.cuda.memory_allocated(self._device) - before)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        if moved < peak // 2:  # or else weights came or went meanwhile: that says nothing
            self._learn(model, call, peak)

    def fell_short(self, model: str, call: ModelCall, asked_bytes: int) -> int:
        """An allocation of `asked_bytes` failed (0: not told): a call takes more than was thought.

        Returns the new estimate.
        """
        before = self.bytes_of(model, call)
        raised = before + asked_bytes if asked_bytes else int(before * _RAISED_BY)
        self._learn(model, call, raised)
        return raised

    def _learn(self, model: str, call: ModelCall, size_bytes: int) -> None:
        with self._lock:
            self._known.pop((model, call), None)
            self._known[model, call] = size_bytes
            while len(self._known) > _CALLS_MAX:
                del self._known[next(iter(self._known))]
