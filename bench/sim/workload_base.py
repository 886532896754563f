"""What every kind of workload has: checked parameters that make a trace of requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import msgspec

from control.scheduler.times.profile import Profile
from control.scheduler.values import DIT, TEXT, VAE

from .case import ASSETS, CaseError
from .trace import TraceRequest


class Workload(Protocol):
    """Parameters that make traces."""

    def make(self, seed: int) -> list[TraceRequest]:
        """The trace of a seed, in order of arrival."""
        ...


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all workloads: the name, which seeds the streams, and a check of the numbers."""

    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "count": (1, 10_000_000),
        "rate": (1e-6, 1e9),
        "slo_scale": (1e-3, 1e6),
        "cv": (0.0, 100.0),
        "request_scale": (1e-3, 1e6),
        "duration_s": (1e-3, 1e9),
        "burst_factor": (1.0, 1e6),
    }
    name: str

    def __post_init__(self) -> None:
        for key, (low, high) in self.RANGES.items():
            value = getattr(self, key, low)
            if not low <= value <= high:
                raise CaseError(f"workload.{key}", value, f"{low:g}..{high:g}")


def request(
    number: int,
    at_s: float,
    model: str,
    workflow: str,
    px: int | tuple[int, int],
    frames: int,
    steps: int,
    slo_s: float,
    priority: int = 0,
) -> TraceRequest:
    """One request; times in seconds, pixels of one side or (width, height)."""
    width, height = (px, px) if isinstance(px, int) else px
    return TraceRequest(
        id=f"r{number:06d}",
        arrival_us=round(at_s * 1e6),
        model=model,
        workflow=workflow,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        slo_us=round(slo_s * 1e6),
        priority=priority,
    )


def alone_us(profile_file: str, steps: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """Encode, all steps and decode on one worker at batch 1, by model and width."""
    profile = Profile.from_csv((ASSETS / "profiles" / profile_file).read_text())
    found: dict[tuple[str, int], int] = {}
    for key, call_us in profile.cells.items():
        if key.model not in steps or key.layout.degree != 1 or key.batch != 1:
            continue
        if key.node in (TEXT, DIT, VAE):
            calls = steps[key.model] if key.node == DIT else 1
            place = (key.model, key.shape.width)
            found[place] = found.get(place, 0) + call_us * calls
    return found
