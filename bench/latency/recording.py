"""Recorded steps, and what the latency model and the search for stragglers make of them.

A recording is what a simulated cluster reported: the real scheduler planned, steps took a
published profile's times with noise, from some moment on one worker was slower. The model that
learns from it was told less than the truth: its profile lacks one size and is wrong by a common
factor. Predictions are written down before each step is shown: every error is one of the future.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from bench.sim.case import ASSETS, Case, ClusterSpec
from bench.sim.costs import Costs, Straggler
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from bench.sim.workloads import generate
from control.scheduler.books.stragglers import Stragglers, own_excesses
from control.scheduler.settings import Settings, SettingValue
from control.scheduler.times.estimate import Cells, estimate_from, fitted, from_relatives
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import CellKey, Family, Profile
from control.scheduler.values import DIT, Layout, Shape, StepsEnded

PROFILE = "flux.1-dev_h100_h28.csv"
UNSEEN = Shape(width=1024, height=1024)
SLOW_WORKER = "w0003"
MACHINE = 1.15  # real times over those that the model was told


@dataclass(frozen=True, slots=True)
class Step:
    """One measured step, and what the profile, without noise and stragglers, has for it."""

    at_us: int
    key: CellKey
    group: tuple[str, ...]
    step_us: int
    true_us: float  # the median: of the noise too
    own_us: tuple[int, ...] = ()  # of that, each member's own; empty for one member


@dataclass(slots=True)
class Learning:
    """How a model fared on one recording."""

    unseen: list[float] = field(default_factory=list)  # |error| at the unseen size, step by step
    measured: list[float] = field(default_factory=list)  # the same, against what was measured
    known: list[float] = field(default_factory=list)  # at the profiled sizes
    untaught: list[float] = field(default_factory=list)  # at the unseen size, by its profile alone
    covered: int = 0  # steps that took no more than their safe quantile
    steps: int = 0
    factors: list[float] = field(default_factory=list)  # of the slow worker, by its slow steps
    flagged_at: int | None = None  # how many of its slow steps it took
    accused: int = 0  # others, or itself before its time


def record(seed: int, noise: float, slowdown: float, policy: str = "hocket") -> list[Step]:
    """A simulated run of eight workers; the slow one is so from a third of the trace on."""
    csv = (ASSETS / "profiles" / PROFILE).read_text()
    profile = Profile.from_csv(csv)
    cluster = ClusterSpec(workers=8).completed(profile)
    trace, from_us = _trace(seed), slow_from_us(seed)
    slow = Straggler(worker=SLOW_WORKER, from_us=from_us, until_us=1 << 60, factor=slowdown)
    case = Case(
        cluster=cluster,
        profile_csv=csv,
        trace=trace,
        settings=Settings(policy=policy, straggler_avoid=100.0),
        costs=Costs(noise=noise),
        stragglers=(slow,) if slowdown > 1 else (),
        seed=seed,
    )
    result = run(case, check=False)
    requests = {t.id: t.to_request() for t in trace}
    given = {a.sequence: a for p in result.plans for a in p.assignments}
    steps: list[Step] = []
    typical = 1.0 + math.log(2.0) * noise / (1.0 - noise)  # median of 1 + exponential
    for fact in result.facts:
        if not isinstance(fact, StepsEnded):
            continue
        a = given[fact.sequence]
        request, degree = requests[a.batch[0].request], len(a.workers)
        layout = Layout(ulysses=degree)
        key = CellKey(request.model, cluster.gpu, a.node, request.shape, layout, len(a.batch))
        us = profile.call_us(key)
        assert us is not None, "the profile has all cells of this workload"
        assert len(fact.step_time_us) == 1, "each step is reported by itself"
        (took_us,), own_us = fact.step_time_us, fact.member_time_us
        steps.append(Step(fact.at_us, key, a.workers, took_us, us * typical, own_us))
    return steps


def slow_from_us(seed: int) -> int:
    """When the slow worker becomes slow."""
    trace = _trace(seed)
    return trace[len(trace) // 3].arrival_us


def _trace(seed: int) -> tuple[TraceRequest, ...]:
    settings: dict[str, SettingValue] = {"rate": 12, "slo_scale": 1.2, "count": 90}
    return tuple(generate("tetriserve-uniform", seed, settings))


def told(machine: float = MACHINE) -> Profile:
    """The profile that the model starts from: no row of the unseen size, and all too fast."""
    cells = Profile.from_csv((ASSETS / "profiles" / PROFILE).read_text()).cells
    return Profile({k: round(us / machine) for k, us in cells.items() if k.shape != UNSEEN})


def learn(steps: Sequence[Step], slow_from_us: int) -> Learning:
    """Shows a model the steps one by one, as control does, and judges it before each."""
    settings = Settings()
    model, stragglers = LatencyModel(told(), settings), Stragglers(settings)
    untaught, found, slow_steps = LatencyModel(told(), settings), Learning(), 0
    for step in steps:
        slow = SLOW_WORKER in step.group and step.at_us > slow_from_us
        slow_steps += slow
        factor = stragglers.factor(step.group)
        if step.key.node == DIT and (not slow or factor > 1.0):
            _judge(found, step, model, untaught, factor)
        sample = model.judge(step.key, step.step_us, step.group)
        own = own_excesses(step.own_us, model.spread(step.key))
        for one in stragglers.observe(step.group, sample, step.at_us, own):
            if one.factor > 1.0:
                model.disown(one.worker)
                if one.worker == SLOW_WORKER and slow:
                    found.flagged_at = found.flagged_at or slow_steps
                else:
                    found.accused += 1
        if slow:
            found.factors.append(stragglers.factor((SLOW_WORKER,)))
        taught = stragglers.factor(step.group) == 1.0
        if taught and model.observe(step.key, step.step_us, step.group) is not None:
            stragglers.forgive()
    return found


def _judge(
    found: Learning, step: Step, model: LatencyModel, untaught: LatencyModel, factor: float
) -> None:
    prediction = model.predict(step.key)
    mean_us, slowed = prediction.mean_us * factor, max(1.0, factor)
    found.steps += 1
    found.covered += step.step_us <= prediction.safe_us * slowed
    if factor > 1.0:
        return  # of a slow group the truth is not known to the microsecond
    error = abs(mean_us / step.true_us - 1.0)
    if step.key.shape == UNSEEN:
        found.unseen.append(error)
        found.measured.append(abs(mean_us / step.step_us - 1.0))
        found.untaught.append(abs(untaught.predict(step.key).mean_us / step.true_us - 1.0))
    else:
        found.known.append(error)


def false_alarms(
    sigma: float, seed: int, steps: int, degrees: tuple[int, ...], *, own: bool = True
) -> int:
    """Workers flagged among eight equal ones: random groups and sizes, lognormal noise; `own`:
    members' own times are told, which scatter as much.
    """
    profile, settings, rng = told(1.0), Settings(), random.Random(seed)
    own_rng = random.Random(f"own {seed}")
    model, stragglers = LatencyModel(profile, settings), Stragglers(settings)
    names, alarms = [f"w{i}" for i in range(8)], 0
    for at_us in range(steps):
        px, degree = rng.choice((256, 512, 2048)), rng.choice(degrees)
        group = tuple(sorted(rng.sample(names, degree)))
        shape, layout = Shape(width=px, height=px), Layout(ulysses=degree)
        key = CellKey("flux.1-dev", "h100", DIT, shape, layout, 1)
        us = profile.call_us(key)
        assert us is not None
        step_us = round(us * math.exp(rng.gauss(0.0, sigma)))
        sample = model.judge(key, step_us, group)
        own_us = _own_us(step_us, sigma, own_rng, degree) if own else ()
        excesses = own_excesses(own_us, model.spread(key))
        news = stragglers.observe(group, sample, at_us, excesses)
        alarms += sum(n.factor > 1.0 for n in news)
        if stragglers.factor(group) == 1.0 and model.observe(key, step_us, group):
            stragglers.forgive()
    return alarms


def _own_us(step_us: int, sigma: float, rng: random.Random, degree: int) -> tuple[int, ...]:
    """The slowest of equal members waits for nobody; the others by chance."""
    if degree == 1:
        return ()
    parts = [math.exp(rng.gauss(0.0, sigma)) for _ in range(degree)]
    return tuple(max(1, round(step_us * part / max(parts))) for part in parts)


class Unseen(NamedTuple):
    """Median |error| of cells that were left out: nearest relatives alone, and with the form."""

    profile: str
    left_out: str
    cells: int
    relatives: float
    form: float


def leave_out(name: str, profile: Profile) -> Iterator[Unseen]:
    """Cells, sizes, degrees and batches of a profile left out in turn, and estimated."""
    families: dict[Family, dict[CellKey, float]] = {}
    for key, us in profile.cells.items():
        families.setdefault(key[:3], {})[key] = us
    ways = {
        "cell": lambda k: k,
        "size": lambda k: k.shape,
        "degree": lambda k: k.layout,
        "batch": lambda k: k.batch,
    }
    for way, group_of in ways.items():
        errors = [e for cells in families.values() for e in _errors(cells, group_of)]
        if errors:
            old, new = (median(e[i] for e in errors) for i in (0, 1))
            yield Unseen(name, way, len(errors), old, new)


def _errors(cells: Cells, group_of: object) -> Iterator[tuple[float, float]]:
    assert callable(group_of)
    groups: dict[object, list[CellKey]] = {}
    for key in cells:
        groups.setdefault(group_of(key), []).append(key)
    for out in groups.values() if len(groups) > 1 else ():
        rest = {k: us for k, us in cells.items() if k not in out}
        form = fitted(rest)
        for key in out:
            old, new = from_relatives(rest, key), estimate_from(rest, form, key)
            if old is not None and new is not None:
                yield abs(old / cells[key] - 1.0), abs(new / cells[key] - 1.0)
