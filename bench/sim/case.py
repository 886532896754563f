"""A Case: cluster, profile, workload, settings; everything a run depends on, as one value.

    [cluster]                                   [workload]
    hosts = 1                                   trace = "uniform.jsonl"     # or
    [[workload.requests]] workers = 8      # a host gpu = "h100"
    [settings]                  # of the scheduler models = [{ name = "flux.1-dev", degrees = [1, 2,
    4, 8] }]              policy = "tetriserve" [profile]
    [settings.policy_settings] file = "flux.1-dev_h100_h28.csv"            fill = true

Paths are relative to the Case's file. Faults are for tests: [[faults]] with at_us, kind and worker
(or request): `lost`, `up` (restarted: a new incarnation), `beat` (alive after all), `drain`, `fail`
(breaks the group it runs in, and is suspected of it), `cancel`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from control.scheduler.profile import Profile
from control.scheduler.settings import SettingError, Settings
from control.scheduler.values import ModelFacts, WorkerUp

from .trace import TraceRequest, read_trace


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that happens to a worker or a request at a time."""

    at_us: int
    kind: Literal["lost", "up", "beat", "drain", "cancel", "fail"]
    worker: str = ""
    request: str = ""
    host: str = "host000"  # of a worker that comes up


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal hosts of equal workers."""

    workers: int
    gpu: str
    models: tuple[ModelFacts, ...]
    hosts: int = 1

    def leases(self, at_us: int) -> tuple[WorkerUp, ...]:
        """The facts by which the workers join, in cluster order."""
        return tuple(
            WorkerUp(
                at_us=at_us,
                worker=f"w{host * self.workers + i:04d}",
                incarnation="1",
                gpu=self.gpu,
                host=f"host{host:03d}",
                models=self.models,
            )
            for host in range(self.hosts)
            for i in range(self.workers)
        )


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the simulator, or of the live system on a manual clock."""

    cluster: ClusterSpec
    profile_csv: str
    trace: tuple[TraceRequest, ...]
    settings: Settings = Settings()
    faults: tuple[Fault, ...] = ()

    @property
    def profile(self) -> Profile:
        return Profile.from_csv(self.profile_csv)


class _ProfileSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    file: str = ""
    csv: str = ""


class _WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    trace: str = ""
    requests: tuple[TraceRequest, ...] = ()


class _CaseFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cluster: ClusterSpec
    profile: _ProfileSpec
    workload: _WorkloadSpec
    settings: Settings = Settings()
    faults: tuple[Fault, ...] = ()


def load_case(path: Path) -> Case:
    """Reads a Case from TOML.

    Raises:
        OSError, tomllib.TOMLDecodeError, msgspec.ValidationError: a file that cannot be read as a
        Case. ProfileError, TraceError, SettingError: one of its parts.
    """
    raw = tomllib.loads(path.read_text())
    try:
        read = msgspec.convert(raw, _CaseFile)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, SettingError):
            raise error.__cause__ from None
        raise
    profile, workload = read.profile, read.workload
    trace = workload.requests
    if workload.trace:
        trace = read_trace((path.parent / workload.trace).read_text())
    return Case(
        cluster=read.cluster,
        profile_csv=(path.parent / profile.file).read_text() if profile.file else profile.csv,
        trace=trace,
        settings=read.settings,
        faults=read.faults,
    )
