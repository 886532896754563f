"""Digests of what every policy decides, on a load of each home: a change of structure keeps them.

A digest is of the whole schedule log: who ran which steps of which requests where and when. Run it
before and after, and compare the two outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console

from bench.sim.case import ASSETS, Case, CaseError, ClusterSpec
from bench.sim.costs import Costs
from bench.sim.experiment import check_models, settings_of
from bench.sim.loop import run
from bench.sim.workloads import generate
from control.scheduler.policies import registry
from control.scheduler.settings import SettingError, Settings
from control.scheduler.times.profile import Profile

COSTS = Costs(group_change_us=5_000, group_cold_us=200_000, noise=0.02)
console = Console(soft_wrap=True)


class Home(NamedTuple):
    """A load, and the workers it runs on."""

    workload: str
    parameters: dict[str, Any]
    profile: str
    loads: str = ""
    memory_mib: int = 0


HOMES = (
    Home("tetriserve-skewed", {"count": 40, "rate": 18}, "flux.1-dev_h100_h28.csv"),
    Home("genserve-balanced-skewed", {"count": 20, "rate": 60}, "genserve_rtx-pro-6000_x1.0.csv"),
    Home(
        "diflow-families",
        {"duration_s": 20.0, "burst_from_s": 6.0, "burst_until_s": 12.0},
        "diflow_families_h800.csv",
        "diflow_families_h800_loads.csv",
        49152,
    ),
)


class Digest(NamedTuple):
    """What a policy did with a load."""

    policy: str
    workload: str
    digest: str  # 16 hex digits, or why it does not run there
    met: str  # requests on time, of all


def digests(seed: int) -> Iterator[Digest]:
    """Every policy on every home."""
    for home in HOMES:
        for policy in registry.names():
            try:
                found = run(_case(home, policy, seed), check=False, keep=False)
            except (CaseError, SettingError) as error:
                yield Digest(policy, home.workload, str(error), "")
                continue
            text = hashlib.sha256(found.log.text().encode()).hexdigest()[:16]
            met = f"{found.summary.met} of {found.summary.requests}"
            yield Digest(policy, home.workload, text, met)


def digests_command(seed: int = 7) -> None:
    """Prints digests of what every policy decides, for comparing two versions of the code."""
    for found in digests(seed):
        console.print(f"{found.workload:26}{found.policy:14}{found.digest:18}{found.met}")


def _case(home: Home, policy: str, seed: int) -> Case:
    profile = (ASSETS / "profiles" / home.profile).read_text()
    trace = generate(home.workload, seed, home.parameters)
    cluster = ClusterSpec(workers=8, memory_mib=home.memory_mib)
    cluster = cluster.completed(Profile.from_csv(profile))
    check_models(trace, cluster)
    return Case(
        cluster=cluster,
        profile_csv=profile,
        loads_csv=(ASSETS / "loads" / home.loads).read_text() if home.loads else "",
        trace=trace,
        settings=settings_of(policy, {}, Settings(), COSTS),
        costs=COSTS,
        seed=seed,
    )
