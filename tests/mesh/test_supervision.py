"""`hocket up` starts again what died, each process on its own port."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from bench.admission.tree import MODEL, profile_csv
from hocket.client import HocketClient
from hocket.errors import HocketError
from hocket.launching import endpoints, mesh_file
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.launching.restarts import RestartRule
from tests.waiting import until

WAIT_S = 120.0


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeshPlan:
    """A mesh of emulated workers."""
    profile, config = tmp_path / "profile.csv", tmp_path / "mesh.toml"
    profile.write_text(profile_csv(step_us=1000))
    config.write_text(f'[control]\nprofiles = ["{profile}"]\n[gpuworker]\ngpu = "emulated"\n')
    monkeypatch.setenv("HOCKET_CONFIG", str(config))
    return MeshPlan(
        state_dir=tmp_path / "state",
        workers=2,
        executor="emulated",
        profile=str(profile),
        log_level="warning",
        restarts=RestartRule(first_s=0.05),
    )


async def draws(address: str) -> None:
    """Makes a picture; again and again, while the mesh is not ready."""
    async with asyncio.timeout(WAIT_S), HocketClient(address) as client:
        while True:
            try:
                await client.generate_media("x", model=MODEL, shape=(64, 64), steps=1)
                return
            except HocketError:
                await asyncio.sleep(0.05)


async def kill(running: RunningMesh, name: str) -> None:
    """kill -9 of a child; returns once it is there again."""
    child = next(one for one in running.children.all if one.name == name)
    pid = child.process.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: child.up.is_set() and child.process.pid != pid)


async def test_every_process_that_is_killed_comes_back_where_it_was(plan: MeshPlan) -> None:
    told: list[str] = []
    async with mesh(plan, told.append) as running:
        for name in ("nats", "control", "gateway", "workers"):
            await kill(running, name)
            await draws(running.gateway)
        found = {one.name: one.restarts for one in mesh_file.read(plan.state_dir)}
        control = endpoints.find(plan.state_dir, "control")
        assert control is not None and control.address == running.control
    assert found == {"nats": 1, "control": 1, "gateway": 1, "workers": 1}
    for name in found:
        assert any(t.startswith(f"{name} was killed by SIGKILL; starts again") for t in told)
    assert mesh_file.read(plan.state_dir) == []
    assert endpoints.living(plan.state_dir, "gateway") == ()
