"""A Case: cluster, profile, workload, settings, costs; everything a run depends on, as one value.

    [cluster]                                   [workload]
    hosts = 1                                   trace = "uniform.jsonl"     # or
    workers = 8      # a host                   [[workload.requests]]
    gpu = "h100"                                [settings]                  # of the scheduler
    models = [{ name = "flux.1-dev",            policy = "tetriserve"
                degrees = [1, 2, 4, 8] }]       [settings.policy_settings]
    [profile]                                   fill = true
    file = "flux.1-dev_h100_h28.csv"            [costs]
    loads = "flux.1-dev_h100_loads.csv"         group_change_us = 3000

Paths are relative to the Case's file, then to `bench/assets`. A gpu kind or models that are not
named are those of the profile. `experiment.py` adds what makes many runs of one file.

Faults are for tests: [[faults]] with at_us, kind and worker (or request): `lost`, `up` (restarted:
a new incarnation), `beat` (alive after all), `drain`, `undrain`, `fail` (breaks the group it runs
in, and is suspected of it), `error` and `memory` (of the batch that it runs), `cancel`.
[[stragglers]] with worker, from_us, until_us, factor.
"""

from __future__ import annotations

import tomllib
import zlib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from control.scheduler.books.loads import LoadTable, own_part
from control.scheduler.settings import SettingError, Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import DIT, TEXT, VAE, ModelFacts, NodeParts, WorkerUp

from .call_times import Contention
from .costs import CostError, Costs, Straggler
from .trace import TraceRequest, read_trace

T = TypeVar("T")
ASSETS = Path(__file__).parents[1] / "assets"


class CaseError(ValueError):
    """A Case's field has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: allowed is {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class FaultSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that happens to a worker or a request at a time."""

    at_us: int
    kind: Literal["lost", "up", "beat", "drain", "undrain", "cancel", "fail", "error", "memory"]
    worker: str = ""
    request: str = ""
    host: str = "host000"  # of a worker that comes up


class PoolSpec(msgspec.Struct, frozen=True):
    """Workers of one kind that hold the weights of some nodes."""

    count: int
    gpu: str
    roles: tuple[str, ...]  # of text, dit, vae

    @classmethod
    def read(cls, text: str) -> tuple[PoolSpec, ...]:
        """Of "7 l20x dit, 6 a10 text vae"; no roles: all. Raises: CaseError."""
        pools = []
        for one in text.split(","):
            count, gpu, *roles = one.split() if len(one.split()) > 1 else ("", "")
            if not (count.isdecimal() and int(count) and {*roles} <= {TEXT, DIT, VAE}):
                allowed = "COUNT KIND ROLE…, with commas between; roles are text, dit, vae"
                raise CaseError("cluster.pools", one, allowed)
            pools.append(cls(int(count), gpu, tuple(roles)))
        return tuple(pools)


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal hosts of equal workers; or pools, each on a host of its own."""

    workers: int = 0  # a host; those of pools are counted
    gpu: str = ""  # "": the one kind that has all of the profile's nodes
    models: tuple[ModelFacts, ...] = ()  # (): all of the profile
    hosts: int = 1
    memory_mib: int = 0  # a worker's, for weights; 0: all models always fit
    pools: str = ""  # see PoolSpec.read; kinds differ, and so do the nodes that they run

    def served(self, loads: LoadTable) -> tuple[ModelFacts, ...]:
        """The models; where weights count, with the parts that their nodes need."""
        return tuple(
            msgspec.structs.replace(model, parts=parts_of(model.name, self.gpu, loads))
            if loads and not model.parts
            else model
            for model in self.models
        )

    def leases(self, at_us: int, loads: LoadTable) -> tuple[WorkerUp, ...]:
        """The facts by which the workers join, in cluster order."""
        models = self.served(loads)
        if self.pools:
            return self._pooled(at_us, models)
        return tuple(
            WorkerUp(
                at_us=at_us,
                worker=f"w{host * self.workers + i:04d}",
                incarnation="1",
                gpu=self.gpu,
                host=f"host{host:03d}",
                models=models,
                memory_mib=self.memory_mib,
            )
            for host in range(self.hosts)
            for i in range(self.workers)
        )

    def _pooled(self, at_us: int, models: tuple[ModelFacts, ...]) -> tuple[WorkerUp, ...]:
        return tuple(
            WorkerUp(
                at_us=at_us,
                worker=f"w{number:02d}{i:02d}",
                incarnation="1",
                gpu=pool.gpu,
                host=f"host{number:03d}",
                models=tuple(msgspec.structs.replace(m, operations=pool.roles) for m in models),
            )
            for number, pool in enumerate(PoolSpec.read(self.pools))
            for i in range(pool.count)
        )

    def kinds(self) -> dict[str, str]:
        """Kind of GPU by worker of a pool."""
        if not self.pools:
            return {}
        return {up.worker: up.gpu for up in self.leases(0, LoadTable({}))}

    def completed(self, profile: Profile) -> ClusterSpec:
        """With the profile's gpu kind and models where none are named. Raises: CaseError."""
        if self.pools:
            return self._completed_pools(profile)
        for name, value, low in (
            ("cluster.workers", self.workers, 1),
            ("cluster.hosts", self.hosts, 1),
            ("cluster.memory_mib", self.memory_mib, 0),
        ):
            if value < low:
                raise CaseError(name, value, f"{low} or more")
        kinds = sorted({k.gpu for k in profile.cells})
        gpu = self.gpu
        if not gpu:
            nodes = {kind: {k.node for k in profile.cells if k.gpu == kind} for kind in kinds}
            whole = [kind for kind in kinds if nodes[kind] == set().union(*nodes.values())]
            if len(whole) != 1:
                raise CaseError("cluster.gpu", gpu, f"one of the profile's: {', '.join(kinds)}")
            gpu = whole[0]
        models = self.models or models_of(profile, gpu)
        if not models:
            raise CaseError("cluster.gpu", gpu, f"a kind with models: {', '.join(kinds)}")
        return msgspec.structs.replace(self, gpu=gpu, models=models)

    def _completed_pools(self, profile: Profile) -> ClusterSpec:
        """Models are those of the kind that denoises."""
        pools = PoolSpec.read(self.pools)
        if self.memory_mib or self.hosts > 1:
            raise CaseError("cluster.pools", self.pools, "none beside memory_mib or hosts")
        gpu = self.gpu or next((p.gpu for p in pools if not p.roles or DIT in p.roles), "")
        models = self.models or models_of(profile, gpu)
        if not models:
            raise CaseError("cluster.pools", self.pools, "kinds of the profile, one with dit")
        workers = sum(pool.count for pool in pools)
        return msgspec.structs.replace(self, gpu=gpu, models=models, workers=workers)


def models_of(profile: Profile, gpu: str) -> tuple[ModelFacts, ...]:
    """What workers of a kind can run by a profile: models, degrees, the batches of all stages."""
    degrees: dict[str, set[int]] = {}
    batches: dict[str, dict[str, int]] = {}
    for key in profile.cells:
        if key.gpu != gpu or key.node not in (TEXT, DIT, VAE):
            continue
        if key.node == DIT:
            degrees.setdefault(key.model, set()).add(key.layout.degree)
        if key.layout.degree == 1:
            largest = batches.setdefault(key.model, {})
            largest[key.node] = max(key.batch, largest.get(key.node, 1))
    return tuple(
        ModelFacts(
            name=model,
            degrees=tuple(sorted(degrees[model])),
            batch_max=min(batches.get(model, {}).values(), default=1),
        )
        for model in sorted(degrees)
    )


def parts_of(model: str, gpu: str, loads: LoadTable) -> tuple[NodeParts, ...]:
    """What the nodes of a model of a load table need. A model named `base+adapter` shares the parts
    of `base` and denoises with `controlnet-adapter` besides, unless the table has rows of its own.
    """
    base, *adapters = model.split("+")
    found = []
    for node in (TEXT, DIT, VAE):
        extra = adapters if node == DIT else []
        names = [own_part(base, node), *(own_part(base, f"controlnet-{a}") for a in extra)]
        if loads.knows(own_part(model, node), gpu):
            names = [own_part(model, node)]
        found.append(NodeParts(node=node, parts=tuple(names)))
    return tuple(found)


class PromiseSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Newcomers are told their finish, and some of them firmly."""

    firm: float = 0.0  # part of the requests whose promise is firm
    refuse: bool = True  # a firm one that is told "late" is refused; else it is best effort

    def __post_init__(self) -> None:
        if not 0 <= self.firm <= 1:
            raise CaseError("promises.firm", self.firm, "0..1")

    def is_firm(self, request: str) -> bool:
        """Drawn by its id, so that more of it is a superset."""
        return zlib.crc32(request.encode()) % 1_000 < 1_000 * self.firm


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the simulator, or of the live system on a manual clock."""

    cluster: ClusterSpec
    profile_csv: str
    trace: tuple[TraceRequest, ...]
    settings: Settings = Settings()
    faults: tuple[FaultSpec, ...] = ()
    loads_csv: str = ""
    costs: Costs = Costs()
    stragglers: tuple[Straggler, ...] = ()
    seed: int = 0  # of the noise
    contention: Contention | None = None  # of the workers of its one host
    promises: PromiseSpec | None = None  # None: nobody is told anything

    def __post_init__(self) -> None:
        if self.contention is not None and self.cluster.hosts > 1:
            raise CaseError("cluster.hosts", self.cluster.hosts, "1 where workers share cores")

    @property
    def profile(self) -> Profile:
        return Profile.from_csv(self.profile_csv)

    @property
    def loads(self) -> LoadTable:
        return LoadTable.from_csv(*([self.loads_csv] if self.loads_csv else []))


class ProfileSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the call times come from, and the weights."""

    file: str = ""
    csv: str = ""
    loads: str = ""


class _WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    trace: str = ""
    requests: tuple[TraceRequest, ...] = ()


class _CaseFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cluster: ClusterSpec
    profile: ProfileSpec
    workload: _WorkloadSpec
    settings: Settings = Settings()
    faults: tuple[FaultSpec, ...] = ()
    costs: Costs = Costs()
    stragglers: tuple[Straggler, ...] = ()
    seed: int = 0


def load_case(path: Path) -> Case:
    """Reads a Case of one run from TOML.

    Raises:
        OSError, tomllib.TOMLDecodeError, msgspec.ValidationError: a file that cannot be read as a
        Case. ProfileError, TraceError, SettingError, CostError, CaseError: one of its parts.
    """
    read = convert(tomllib.loads(path.read_text()), _CaseFile)
    trace = read.workload.requests
    if read.workload.trace:
        trace = read_trace((path.parent / read.workload.trace).read_text())
    profile_csv, loads_csv = read_profile(read.profile, path.parent)
    return Case(
        cluster=read.cluster.completed(Profile.from_csv(profile_csv)),
        profile_csv=profile_csv,
        loads_csv=loads_csv,
        trace=trace,
        settings=read.settings,
        faults=read.faults,
        costs=read.costs,
        stragglers=read.stragglers,
        seed=read.seed,
    )


def convert(raw: dict[str, Any], kind: type[T]) -> T:
    """Builds a value; an error of one of our own checks comes out as itself."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, SettingError | CostError | CaseError):
            raise error.__cause__ from None
        raise


def read_profile(spec: ProfileSpec, folder: Path) -> tuple[str, str]:
    """Texts of the profile and of the weights ("" where none are named). Raises: CaseError."""
    if bool(spec.file) == bool(spec.csv):
        raise CaseError("profile.file", spec.file, "a file, or csv with the text, not both")
    text = spec.csv or _found("profile.file", spec.file, folder, "profiles").read_text()
    if not spec.loads:
        return text, ""
    return text, _found("profile.loads", spec.loads, folder, "loads").read_text()


def _found(field: str, name: str, folder: Path, kind: str) -> Path:
    for path in (folder / name, ASSETS / kind / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.name for p in (ASSETS / kind).glob("*.csv")))
    raise CaseError(field, name, f"a path beside the Case's file, or one of {known}")
