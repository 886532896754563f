"""What a run adds to the profile's times: moving, late reports, noise, stragglers.

Moving costs lie inside the run's interval, before its first step, and are told by its first report.

    group change   the job goes on on other workers: its latent moves
    cold group     these workers, in this order and epoch, never worked together: they form a group
    noise          each step takes 1 + x times the profile's time, x exponential
    own times      what of a group's step is each member's own: 1 + x times its part, x of a stream
                   that is the member's, brought to scale so that the slowest waits for nobody
"""

from __future__ import annotations

import math
import zlib

import msgspec

from control.scheduler.values import Assignment

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class CostError(ValueError):
    """A cost or a straggler has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: allowed is {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Microseconds, but for the noise. Raises CostError when built with what makes no sense."""

    group_change_us: int = 0  # a denoise or decode run on other workers than the job's last run
    group_cold_us: int = 0  # in addition, the first run of a group of several workers
    noise: float = 0.0  # coefficient of variation of a step's time
    report_delay_us: int = 0  # from the end of a step to the report's coming in
    report_us: int = 0  # steps shorter than that are reported together; 0: each by itself

    def __post_init__(self) -> None:
        for name in ("group_change_us", "group_cold_us", "report_delay_us", "report_us"):
            value = getattr(self, name)
            if value < 0:
                raise CostError(name, value, "0 or more microseconds")
        if not 0 <= self.noise < 1:
            raise CostError("noise", self.noise, "a coefficient of variation in 0 <= CV < 1")


class Straggler(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker is slower for a while; its groups wait for it. Raises CostError as `Costs` does."""

    worker: str
    from_us: int
    until_us: int
    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.from_us < self.until_us:
            raise CostError("from_us", self.from_us, f"0..{self.until_us - 1}, before until_us")
        if not 1 <= self.factor <= 1000:
            raise CostError("factor", self.factor, "1..1000")


class StepTimes:
    """What a step takes on a group, and how much of that is each member's own."""

    def __init__(self, costs: Costs, stragglers: tuple[Straggler, ...], seed: int) -> None:
        self._noise = Noise(costs.noise, seed)
        self._slow = StragglerSchedule(stragglers)
        self._even = not (costs.noise or stragglers)

    def of(self, a: Assignment, made: int, call_us: int, at_us: int) -> tuple[int, tuple[int, ...]]:
        """Of the step behind `made` ones, which begins then and would take `call_us`."""
        step_us = call_us
        first = a.batch[0]
        if not self._even:
            noise = self._noise.factor(first.request, a.node, first.first_step + made)
            step_us = round(step_us * noise * self._slow.factor(a.workers, at_us))
        if len(a.workers) == 1:
            return step_us, ()
        if self._even:
            return step_us, (step_us,) * len(a.workers)
        parts = [
            self._slow.factor((worker,), at_us)
            * self._noise.factor(first.request, f"{a.node}/{worker}", first.first_step + made)
            for worker in a.workers
        ]
        longest = max(parts)
        return step_us, tuple(max(1, round(step_us * part / longest)) for part in parts)


class Noise:
    """Factors of step times: a function of seed, request, node and step, so that policies meet the
    same noise.
    """

    def __init__(self, cv: float, seed: int) -> None:
        """`cv`: 0 <= cv < 1; 1 + x with x exponential of mean cv / (1 - cv) has just that CV."""
        self._mean = cv / (1 - cv)
        self._seed = (seed * _GOLDEN) & _MASK
        self._streams: dict[tuple[str, str], int] = {}

    def factor(self, request: str, node: str, step: int) -> float:
        """At least 1."""
        if not self._mean:
            return 1.0
        stream = self._streams.get((request, node))
        if stream is None:
            text = zlib.crc32(f"{node}/{request}".encode())
            stream = self._streams[request, node] = _mix(self._seed ^ _mix(text))
        unit = (_mix((stream + step * _GOLDEN) & _MASK) >> 11) / (1 << 53)
        return 1.0 - self._mean * math.log1p(-unit)


def _mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class StragglerSchedule:
    """How much slower a group is at a time."""

    def __init__(self, stragglers: tuple[Straggler, ...]) -> None:
        self._spans: dict[str, list[Straggler]] = {}
        for straggler in stragglers:
            self._spans.setdefault(straggler.worker, []).append(straggler)

    def factor(self, workers: tuple[str, ...], at_us: int) -> float:
        """Of a step that starts then: its slowest member's, at least 1."""
        if not self._spans:
            return 1.0
        spans = [s for w in workers for s in self._spans.get(w, ())]
        return max((s.factor for s in spans if s.from_us <= at_us < s.until_us), default=1.0)
