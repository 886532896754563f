"""An experiment: one Case file that makes many runs.

    name = "t2-slo-sweep"                       [sweep]                 # the product makes cells
    title = "SLO scale, 12 a minute"            slo_scale = [1.0, 1.2, 1.5]
    seeds = "0-19"                              [[cells]]               # or one by one
    [cluster]                                   workload = "tetriserve-uniform"
    workers = 8                                 [[policies]]
    [profile]                                   name = "tetriserve"
    file = "flux.1-dev_h100_h28.csv"            label = "tetriserve, event-driven"
    [workload]                                  settings = { rounds = false }
    name = "tetriserve-uniform"                 [[paper]]
    rate = 12                                   cell = { slo_scale = 1.2 }
    [costs]                                     policy = "tetriserve"
    group_change_us = 3000                      value = 0.91
                                                source = "README table, approximate"

A key of a cell or a sweep is `workload` (its name), a parameter of the workload, a cost, `workers`,
`hosts`, `memory_mib`, `pools`, `profile`, `loads`, or `firm` and `refuse` of `[promises]`
(`case.py`). All policies meet the same requests in a cell and seed.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from control.scheduler.policies import registry
from control.scheduler.schedule_log import DoneLine
from control.scheduler.settings import SettingError, Settings, SettingValue, read_policy_settings
from control.scheduler.times.profile import Profile

from .case import (
    Case,
    CaseError,
    ClusterSpec,
    FaultSpec,
    ProfileSpec,
    PromiseSpec,
    convert,
    read_profile,
)
from .costs import Costs, Straggler
from .loop import Timer, run
from .paper import PaperRow
from .trace import TraceRequest, read_trace
from .workloads import generate, workload

COSTS = tuple(f.name for f in msgspec.structs.fields(Costs))
CLUSTER = ("workers", "hosts", "memory_mib", "pools")
PROMISES = ("firm", "refuse")
SETTINGS = {
    f.name: f.default
    for f in msgspec.structs.fields(Settings)
    if f.name not in ("policy", "policy_settings")
}
SEEDS_MAX = 100_000


class PolicySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One policy in one tuning."""

    name: str
    label: str = ""  # "": the name
    settings: dict[str, SettingValue] = {}  # the policy's, or the scheduler's
    loads: str = ""  # another file of weights, for systems that do not share them
    memory_mib: int | None = None  # another memory of the workers
    pools: str = ""  # other workers, as `cluster.pools` has them

    @property
    def shown(self) -> str:
        return self.label or self.name


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cluster: ClusterSpec
    profile: ProfileSpec
    workload: dict[str, Any]
    name: str = ""
    title: str = ""
    description: str = ""
    seeds: str = "0-19"
    seed: int = 0
    settings: Settings = Settings()
    faults: tuple[FaultSpec, ...] = ()
    stragglers: tuple[Straggler, ...] = ()
    costs: Costs = Costs()
    sweep: dict[str, list[SettingValue]] = {}
    cells: tuple[dict[str, SettingValue], ...] = ()
    promises: PromiseSpec | None = None
    policies: tuple[PolicySpec, ...] = ()
    paper: tuple[PaperRow, ...] = ()


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One run of an experiment: everything a process needs to do it."""

    case: str
    title: str
    cell: dict[str, Any]
    policy: PolicySpec
    seed: int
    cluster: ClusterSpec
    profile_file: str
    profile_csv: str
    loads_csv: str
    costs: Costs
    base: Settings
    workload: str
    parameters: dict[str, Any]
    trace: tuple[TraceRequest, ...] | None = None
    faults: tuple[FaultSpec, ...] = ()
    stragglers: tuple[Straggler, ...] = ()
    promises: PromiseSpec | None = None
    check: bool = True

    def to_case(self) -> Case:
        """The Case of this run. Raises: CaseError, SettingError."""
        trace = self.trace
        if trace is None:
            trace = generate(self.workload, self.seed, self.parameters)
        check_models(trace, self.cluster)
        return Case(
            cluster=self.cluster,
            profile_csv=self.profile_csv,
            loads_csv=self.loads_csv,
            trace=trace,
            settings=settings_of(self.policy.name, self.policy.settings, self.base, self.costs),
            costs=self.costs,
            faults=self.faults,
            stragglers=self.stragglers,
            seed=self.seed,
            promises=self.promises,
        )


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """A Case file, read and checked."""

    path: Path
    file: _File

    @property
    def name(self) -> str:
        return self.file.name or self.path.stem

    @property
    def plain(self) -> bool:
        """It is a Case of one run."""
        file = self.file
        return not (file.policies or file.cells or file.sweep or "name" in file.workload)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(p.shown for p in self._policies())

    def cells(self) -> list[dict[str, SettingValue]]:
        """What differs from the file's own values, cell by cell."""
        made: list[dict[str, SettingValue]] = []
        for cell in self.file.cells or ({},):
            for values in itertools.product(*self.file.sweep.values()):
                made.append({**cell, **dict(zip(self.file.sweep, values, strict=True))})
        return made

    def runs(
        self, seeds: Sequence[int], policies: Sequence[str] = (), *, check: bool = True
    ) -> list[RunSpec]:
        """All runs in order of cell, policy, seed. `policies`: labels or names; empty: all.

        Raises:
            CaseError, SettingError: a policy, parameter or setting that is not allowed.
        """
        chosen = self._policies()
        if policies:
            known = {p.shown for p in chosen} | {p.name for p in chosen}
            for name in policies:
                if name not in known and name not in registry.names():
                    raise CaseError("policies", name, f"one of {', '.join(sorted(known))}")
            listed = tuple(p for p in chosen if p.shown in policies or p.name in policies)
            more = tuple(PolicySpec(name=name) for name in policies if name not in known)
            chosen = listed + more
        made = []
        for cell in self.cells():
            for policy in chosen:
                made += self._in_cell(cell, policy, seeds, check)
        for spec in {(s.policy.shown): s for s in made}.values():
            settings_of(spec.policy.name, spec.policy.settings, spec.base, spec.costs)
        return made

    def _policies(self) -> tuple[PolicySpec, ...]:
        settings = self.file.settings
        return self.file.policies or (
            PolicySpec(name=settings.policy, settings=settings.policy_settings),
        )

    def _in_cell(
        self,
        cell: Mapping[str, SettingValue],
        policy: PolicySpec,
        seeds: Sequence[int],
        check: bool,
    ) -> list[RunSpec]:
        file = self.file
        profile = msgspec.structs.replace(
            file.profile,
            **{"file": str(cell.get("profile", file.profile.file))},
            loads=policy.loads or str(cell.get("loads", file.profile.loads)),
        )
        profile_csv, loads_csv = read_profile(profile, self.path.parent)
        cluster = _replaced(file.cluster, {k: cell[k] for k in CLUSTER if k in cell})
        if policy.memory_mib is not None:
            cluster = msgspec.structs.replace(cluster, memory_mib=policy.memory_mib)
        if policy.pools:
            cluster = msgspec.structs.replace(cluster, pools=policy.pools)
        others = {*COSTS, *CLUSTER, *PROMISES, "profile", "loads", "workload"}
        told = {k: cell[k] for k in PROMISES if k in cell}
        own = {k: v for k, v in file.workload.items() if k != "name"}
        parameters = {**own, **{k: v for k, v in cell.items() if k not in others}}
        name = str(cell.get("workload", file.workload.get("name", "")))
        trace = self._trace(own)
        if trace is None:
            workload(name, parameters)
        shown = {k: v for k, v in parameters.items() if isinstance(v, SettingValue)}
        spec = RunSpec(
            case=self.name,
            title=file.title,
            cell={"workload": name or "trace", **shown, **cell},
            policy=policy,
            seed=0,
            cluster=cluster.completed(Profile.from_csv(profile_csv)),
            profile_file=profile.file,
            profile_csv=profile_csv,
            loads_csv=loads_csv,
            costs=_replaced(file.costs, {k: cell[k] for k in COSTS if k in cell}),
            base=file.settings,
            workload=name,
            parameters=parameters,
            trace=trace,
            faults=file.faults,
            stragglers=file.stragglers,
            promises=_replaced(file.promises or PromiseSpec(), told) if told else file.promises,
            check=check,
        )
        return [msgspec.structs.replace(spec, seed=seed) for seed in seeds]

    def _trace(self, parameters: Mapping[str, Any]) -> tuple[TraceRequest, ...] | None:
        """The requests where the file names or lists them, None for a generator."""
        if "trace" in parameters:
            return read_trace((self.path.parent / str(parameters["trace"])).read_text())
        if "requests" in parameters:
            return msgspec.convert(parameters["requests"], tuple[TraceRequest, ...])
        return None


def load_experiment(path: Path) -> Experiment:
    """Reads a Case file.

    Raises:
        OSError, tomllib.TOMLDecodeError, msgspec.ValidationError: it cannot be read as one.
        CaseError, CostError, SettingError, ProfileError, TraceError: a value is not allowed.
    """
    return Experiment(path=path, file=convert(tomllib.loads(path.read_text()), _File))


def parse_seeds(text: str) -> list[int]:
    """Seeds of a text like `0-19` or `3,5,7-9`. Raises: CaseError."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise CaseError("seeds", text, "numbers and ranges, such as 0-19 or 3,5,7-9")
        span = range(int(low), int(high or low) + 1)
        if not span or len(span) > SEEDS_MAX:
            raise CaseError("seeds", text, f"ranges that go up, of at most {SEEDS_MAX}")
        seeds += span
    return seeds


def settings_of(
    policy: str, given: Mapping[str, SettingValue], base: Settings, costs: Costs
) -> Settings:
    """The scheduler's settings; it is told what moving costs, as an operator would tell it.

    `given` holds the policy's settings and the scheduler's own; values may be texts.

    Raises:
        CaseError: no such policy. SettingError: an unknown key, or a value that is not allowed.
    """
    if policy not in registry.names():
        raise CaseError("policy", policy, f"one of {', '.join(registry.names())}")
    registered = registry.find(policy)
    own: dict[str, SettingValue] = {
        "group_change_us": base.group_change_us or costs.group_change_us,
        "group_cold_us": base.group_cold_us or costs.group_cold_us,
    }
    of_policy: dict[str, SettingValue] = {}
    for key, value in given.items():
        if key in registered.specs:
            of_policy[key] = _typed(key, value, registered.specs[key].default)
        elif key in SETTINGS:
            own[key] = _typed(key, value, SETTINGS[key])
        else:
            allowed = ", ".join([*registered.specs, *SETTINGS])
            raise SettingError(f"{policy}.{key}", value, f"one of {allowed}")
    read_policy_settings(policy, registered.specs, of_policy)
    return msgspec.structs.replace(base, **own, policy=policy, policy_settings=of_policy)


def check_models(trace: Sequence[TraceRequest], cluster: ClusterSpec) -> None:
    """Somebody can run every model of the trace. Raises: CaseError."""
    known = {m.name for m in cluster.models}
    for item in trace:
        if item.model not in known:
            raise CaseError("trace.model", item.model, f"one of {', '.join(sorted(known))}")


def run_row(spec: RunSpec, timer: Timer | None = None) -> dict[str, Any]:
    """Runs once and tells about it: one line of `runs.jsonl` (without `wall_s`)."""
    case = spec.to_case()
    result = run(case, timer=timer, check=spec.check, keep=False)
    finish_us = {x.request: x.finish_us for x in result.log.lines() if isinstance(x, DoneLine)}
    summary = result.summary
    latencies: dict[str, list[float]] = {name: [] for name in summary.by_class}
    for item in case.trace:
        if item.id in finish_us:
            name = f"{item.model} {item.width}x{item.height}x{item.frames}"
            latencies[name].append((finish_us[item.id] - item.arrival_us) / 1e6)
    return {
        "case": spec.case,
        "title": spec.title,
        "cell": spec.cell,
        "policy": spec.policy.name,
        "label": spec.policy.shown,
        "settings": spec.policy.settings,
        "seed": spec.seed,
        "gpus": spec.cluster.workers * spec.cluster.hosts,
        "profile": spec.profile_file,
        "costs": msgspec.to_builtins(spec.costs),
        "summary": msgspec.to_builtins(summary),
        "classes": {
            name: {"requests": c.requests, "met": c.met, "latency_s": sorted(latencies[name])}
            for name, c in summary.by_class.items()
        },
        "bound": None,
        "plans": result.plan_count,
    }


def _replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """A struct with some fields changed, checked as when it is read."""
    if not changes:
        return value
    return convert({**msgspec.to_builtins(value), **changes}, type(value))


def _typed(key: str, value: SettingValue, default: object) -> SettingValue:
    """A text in the type of the setting's default; other values as they are."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, int):
            return int(value)
        return float(value)
    except (KeyError, ValueError):
        kind = (
            "true | false" if isinstance(default, bool) else f"a number ({type(default).__name__})"
        )
        raise SettingError(key, value, kind) from None
