"""How live runs of a Case differ from the simulated one, in what users see.

error      |live - simulated| / simulated of a request's latency, the median over requests:
           of one live run at a time, and of each request's median over all live runs
spread     the same between two live runs: how well a live run repeats itself
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from rich.table import Column, Table

from bench.live.run import RequestOutcome
from bench.reporting.statistics import mean_interval
from bench.sim.case import Case
from bench.sim.loop import run
from control.scheduler.schedule_log import DoneLine
from control.scheduler.summary import percentile

Outcomes = Mapping[str, RequestOutcome]  # by request


@dataclass(frozen=True)
class Differences:
    """From one simulated run. Attainment of 1, errors as shares."""

    attainment: float  # simulated
    one_p50: float  # of a live run: the mean over those
    error_p50: float  # of each request's median over the live runs
    error_p90: float
    bias_p50: float  # with its sign: above 0, live took longer
    latency_s: float  # simulated, p50


@dataclass(frozen=True)
class LiveComparison:
    """Live runs of a Case with one seed, beside the simulator."""

    policy: str
    seed: int
    requests: int
    attainments: tuple[float, ...]  # of the live runs
    spread_p50: float  # between two live runs: the mean over pairs; 0 for one run
    latency_s: float  # live, p50
    problems: int  # requests that were refused or failed, of all runs
    simulated: Differences
    own: Differences  # simulated with what calls took in these very live runs

    @property
    def attainment(self) -> float:
        """Live, the mean over the runs."""
        return mean(self.attainments)

    @property
    def points(self) -> float:
        """Attainment live over simulated, in points."""
        return 100 * (self.attainment - self.simulated.attainment)

    @property
    def line(self) -> str:
        """In one sentence."""
        s, o = self.simulated, self.own
        return (
            f"{self.policy} seed {self.seed}: on time {_percents(self.attainments)} % live, "
            f"{100 * s.attainment:.1f} % simulated; error p50 {100 * s.error_p50:.1f} % (one run "
            f"{100 * s.one_p50:.1f} %, live against live {100 * self.spread_p50:.1f} %), bias "
            f"{100 * s.bias_p50:+.1f} %; with the runs' own times {100 * o.attainment:.1f} %, "
            f"{100 * o.error_p50:.1f} %"
            + (f"; {self.problems} refused or failed" if self.problems else "")
        )


def compare(
    policy: str, seed: int, lives: Sequence[Outcomes], case: Case, own: Case
) -> LiveComparison:
    """Runs the simulator, with a measured profile and with the live runs' own, and compares."""
    took = _latencies(lives)
    pairs = [
        median(abs(a[r] / b[r] - 1) for r in a.keys() & b.keys())
        for a, b in itertools.combinations([_latencies([live]) for live in lives], 2)
    ]
    return LiveComparison(
        policy=policy,
        seed=seed,
        requests=len(case.trace),
        attainments=tuple(
            sum(o.on_time for o in live.values()) / len(case.trace) for live in lives
        ),
        spread_p50=mean(pairs) if pairs else 0.0,
        latency_s=median(took.values()) / 1e6 if took else 0.0,
        problems=sum(o.latency_us is None for live in lives for o in live.values()),
        simulated=_differences(case, lives),
        own=_differences(own, lives),
    )


def table(found: Sequence[LiveComparison]) -> Table:
    """One row a policy, means over seeds with 95 % intervals."""
    shown = Table(
        Column("policy", no_wrap=True),
        *("seeds", "runs", "requests", "on time live %", "simulated %", "points"),
        *("error p50 %", "p90 %", "one run %", "live/live %", "bias %"),
        *("latency live s", "simulated s", "own times: error p50 %"),
        title="live against simulated",
    )
    for policy in dict.fromkeys(c.policy for c in found):
        rows = [c for c in found if c.policy == policy]
        simulated = [c.simulated for c in rows]
        shown.add_row(
            policy,
            str(len(rows)),
            str(sum(len(c.attainments) for c in rows)),
            str(sum(c.requests for c in rows)),
            _mean([100 * c.attainment for c in rows]),
            _mean([100 * s.attainment for s in simulated]),
            _mean([c.points for c in rows]),
            _mean([100 * s.error_p50 for s in simulated]),
            _mean([100 * s.error_p90 for s in simulated]),
            _mean([100 * s.one_p50 for s in simulated]),
            _mean([100 * c.spread_p50 for c in rows]),
            _mean([100 * s.bias_p50 for s in simulated]),
            _mean([c.latency_s for c in rows], 2),
            _mean([s.latency_s for s in simulated], 2),
            _mean([100 * c.own.error_p50 for c in rows]),
        )
    return shown


def _differences(case: Case, lives: Sequence[Outcomes]) -> Differences:
    result = run(case)
    finish_us = {x.request: x.finish_us for x in result.log.lines() if isinstance(x, DoneLine)}
    sim_us = {t.id: finish_us[t.id] - t.arrival_us for t in case.trace if t.id in finish_us}
    biases = _biases(_latencies(lives), sim_us)
    errors = sorted(map(abs, biases))
    ones = [sorted(map(abs, _biases(_latencies([live]), sim_us))) for live in lives]
    return Differences(
        attainment=result.summary.attainment,
        one_p50=mean(percentile(one, 50) for one in ones),
        error_p50=percentile(errors, 50),
        error_p90=percentile(errors, 90),
        bias_p50=median(biases) if biases else 0.0,
        latency_s=result.summary.latency_s.p50,
    )


def _latencies(lives: Sequence[Outcomes]) -> dict[str, float]:
    """Of each request that was done in all runs: its median over them."""
    found: dict[str, float] = {}
    for request in lives[0]:
        took = [o.latency_us for live in lives if (o := live[request]).latency_us is not None]
        if len(took) == len(lives):
            found[request] = median(took)
    return found


def _biases(live_us: Mapping[str, float], sim_us: Mapping[str, int]) -> list[float]:
    return [live_us[r] / sim_us[r] - 1 for r in sim_us if r in live_us]


def _mean(values: Sequence[float], digits: int = 1) -> str:
    interval = mean_interval(values)
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in shares)
