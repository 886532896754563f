"""The planner is compiled before it is needed, and where its folder cannot be written, too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.sim.case import Case, ClusterSpec
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from control.scheduler.policies.hocket.search import decide
from control.scheduler.settings import Settings
from control.scheduler.values import ModelFacts
from control.scheduler.warm import compile_all

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "control/assets/profiles/flux.1-dev_h100_h28.csv"


def trace(requests: int) -> tuple[TraceRequest, ...]:
    return tuple(
        TraceRequest(
            id=f"r{i}",
            arrival_us=50_000 * i,
            model="flux.1-dev",
            workflow="txt2img",
            width=512,
            height=512,
            frames=1,
            steps=10,
            slo_us=3_000_000,
            priority=0,
        )
        for i in range(requests)
    )


def test_a_run_needs_nothing_that_warming_did_not_compile() -> None:
    compile_all()
    known = list(decide.signatures)
    for workers, requests in ((1, 1), (1, 8), (8, 8)):
        models = (ModelFacts(name="flux.1-dev", degrees=(1, 2, 4, 8)),)
        case = Case(
            cluster=ClusterSpec(workers=workers, gpu="h100", models=models),
            profile_csv=PROFILE.read_text(),
            trace=trace(requests),
            settings=Settings(policy="hocket", lead_us=20_000),
        )
        run(case)
    assert len(known) == 2 and decide.signatures == known


FIRM = """
from control.scheduler.policies.hocket import guards, kernel, search
from control.scheduler.warm import compile_all
from tests.scheduler.driving import World
from tests.scheduler.test_firm_promises import admitted, drained, request

def compiled():
    entrances = (search.decide, search.give_up, guards.relax, kernel.rollout)
    return [list(entrance.signatures) for entrance in entrances]

compile_all()
known = compiled()
for workers, requests in ((1, 1), (1, 8), (8, 8)):
    world = World(workers=workers, policy="hocket", lead_us=20_000)
    for i in range(requests):
        assert admitted(world, request(f"r{i}", slo_us=20_000_000 + i, firm=True))
        world.plan()
    assert all(drained(world).values())
assert compiled() == known, (known, compiled())
"""


def test_firm_promises_need_nothing_that_warming_did_not_compile() -> None:
    """In a process of its own: nothing else has called the kernels there."""
    made = subprocess.run(
        [sys.executable, "-c", FIRM], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert made.returncode == 0, made.stderr


def imported(folder: Path) -> subprocess.CompletedProcess[str]:
    """Imports the planner of a copy of control, for a user who has no home."""
    environment = {**os.environ, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    environment.pop("NUMBA_CACHE_DIR", None)
    code = "import control.scheduler.core as core; print(core.__file__)"
    return subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


def test_nowhere_to_keep_it_is_no_reason_not_to_start(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "control", tmp_path / "control", ignore=ignored)
    (tmp_path / "control/scheduler/policies/hocket/__pycache__").write_text("no folder")
    run = imported(tmp_path)
    assert run.returncode == 0 and str(tmp_path) in run.stdout, run.stderr
    (tmp_path / "control/__init__.py").write_text("")  # the planted negative: numba by itself
    run = imported(tmp_path)
    assert run.returncode != 0 and "cannot cache function" in run.stderr
