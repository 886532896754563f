"""What a request asks of the cluster at the very least: its modes, stage times and window.

A mode is one way to run a call: (wall seconds, GPU seconds charged to one member), that is
`call` and `degree / batch * call`. Only modes on the lower convex hull matter to a bound, since a
mix of hull modes does the same calls in no more wall time and no more GPU time than any other.
Times below are the shortest and charges the cheapest over all modes, each on its own: optimistic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.sim.trace import TraceRequest
from control.scheduler.times.profile import Profile
from control.scheduler.values import DIT, TEXT, VAE, Shape

TEXT_PART = "text-"  # nodes of this prefix are the encoders of a model whose `text` is split


class Mode(NamedTuple):
    """One way to run one call."""

    wall_s: float
    gpu_s: float  # charged to one member of the batch


class Stage(NamedTuple):
    """Least wall time and least charge of one stage, not necessarily of one mode."""

    wall_s: float = 0.0
    gpu_s: float = 0.0


class RequestDemand(NamedTuple):
    """What one request needs; times from the trace's start."""

    request: str
    arrival_s: float
    deadline_s: float
    steps: int
    modes: tuple[Mode, ...]  # of one step, fastest first
    text: Stage
    decode: Stage

    @property
    def denoise_s(self) -> float:
        """All steps in the fastest mode."""
        return self.steps * self.modes[0].wall_s

    @property
    def feasible_alone(self) -> bool:
        """Whether the deadline can be met with the whole cluster to itself."""
        alone_s = self.text.wall_s + self.denoise_s + self.decode.wall_s
        return alone_s <= self.deadline_s - self.arrival_s + 1e-9


class UnknownDemand(ValueError):
    """The profile says nothing about a request's steps."""

    def __init__(self, request: TraceRequest) -> None:
        shape = f"{request.width}x{request.height}x{request.frames}"
        super().__init__(f"{request.id}: the profile has no dit row for {request.model} {shape}")
        self.request = request


def demands(
    trace: Sequence[TraceRequest], profile: Profile, gpus: int, tolerance: float = 0.0
) -> tuple[RequestDemand, ...]:
    """One demand a request, with calls up to `tolerance` (a share) faster than profiled.

    Raises: UnknownDemand.
    """
    table = _calls(profile, gpus, 1.0 - tolerance)
    nodes = sorted({(model, node) for model, node, _ in table})
    found = []
    for r in trace:
        shape = Shape(width=r.width, height=r.height, frames=r.frames)
        modes = table.get((r.model, DIT, shape))
        if not modes:
            raise UnknownDemand(r)
        parts = [
            table.get((model, node, shape), ())
            for model, node in nodes
            if model == r.model and node.startswith(TEXT_PART)
        ]
        arrival_s = r.arrival_us / 1e6
        found.append(
            RequestDemand(
                request=r.id,
                arrival_s=arrival_s,
                deadline_s=arrival_s + r.slo_us / 1e6,
                steps=r.steps,
                modes=modes,
                text=_text(table.get((r.model, TEXT, shape), ()), [p for p in parts if p]),
                decode=_cheapest(table.get((r.model, VAE, shape), ())),
            )
        )
    return tuple(found)


def lower_hull(modes: Iterable[Mode]) -> tuple[Mode, ...]:
    """The modes that no mix of others beats in both wall and GPU time, fastest first."""
    hull: list[Mode] = []
    for mode in sorted(set(modes)):
        if hull and mode.gpu_s >= hull[-1].gpu_s:
            continue
        while len(hull) > 1 and not _below(hull[-1], hull[-2], mode):
            hull.pop()
        hull.append(mode)
    return tuple(hull)


def _below(middle: Mode, left: Mode, right: Mode) -> bool:
    """Whether `middle` lies strictly under the line from `left` to `right`."""
    share = (middle.wall_s - left.wall_s) / (right.wall_s - left.wall_s)
    return middle.gpu_s < left.gpu_s + share * (right.gpu_s - left.gpu_s)


_Table = dict[tuple[str, str, Shape], tuple[Mode, ...]]


def _calls(profile: Profile, gpus: int, factor: float) -> _Table:
    """Hull modes by (model, node, shape); the fastest layout and GPU kind counts for a degree."""
    fastest: dict[tuple[str, str, Shape], dict[tuple[int, int], float]] = {}
    for key, call_us in profile.cells.items():
        if key.layout.degree > gpus:
            continue
        cells = fastest.setdefault((key.model, key.node, key.shape), {})
        place = (key.layout.degree, key.batch)
        cells[place] = min(cells.get(place, float("inf")), call_us / 1e6)
    return {
        key: lower_hull(
            Mode(call_s * factor, call_s * factor * degree / batch)
            for (degree, batch), call_s in _filled(cells).items()
        )
        for key, cells in fastest.items()
    }


def _filled(cells: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """With the batch sizes between profiled ones, linear in the batch."""
    filled = dict(cells)
    for degree in {d for d, _ in cells}:
        known = sorted(b for d, b in cells if d == degree)
        for low, high in itertools.pairwise(known):
            begin_s, end_s = cells[degree, low], cells[degree, high]
            for batch in range(low + 1, high):
                share = (batch - low) / (high - low)
                filled[degree, batch] = begin_s + share * (end_s - begin_s)
    return filled


def _cheapest(modes: Sequence[Mode]) -> Stage:
    if not modes:
        return Stage()
    return Stage(min(m.wall_s for m in modes), min(m.gpu_s for m in modes))


def _text(whole: Sequence[Mode], parts: Sequence[Sequence[Mode]]) -> Stage:
    """One `text` call or all encoders, which may run side by side: the longest counts."""
    options = [_cheapest(whole)] if whole else []
    if parts:
        stages = [_cheapest(p) for p in parts]
        options.append(Stage(max(s.wall_s for s in stages), sum(s.gpu_s for s in stages)))
    if not options:
        return Stage()
    return Stage(min(o.wall_s for o in options), min(o.gpu_s for o in options))
