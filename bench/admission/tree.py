"""A mesh of emulated workers, started by `hocket up` of some source tree."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hocket import config
from hocket.errors import MeshStopped
from hocket.launching import endpoints
from hocket.launching.endpoints import Endpoint

_START_S = 300.0  # the first one compiles the planner
_STOP_S = 60.0
MODEL = "bench"
_ROWS = (("text", 1, 1_000), ("dit", 1, 50_000), ("vae", 1, 1_000))


@dataclass(frozen=True)
class Started:
    """Where the mesh listens, and whom to look at."""

    gateway: str  # "host:port"
    control: str
    pids: dict[str, int]  # "gateway" and "control"


def profile_csv(step_us: int = 50_000) -> str:
    """Call times of the one model: pictures of 64 px, one worker each."""
    lines = ["model,gpu,node,width,height,frames,degree,batch,call_us,source"]
    for node, degree, call_us in _ROWS:
        told = step_us if node == "dit" else call_us
        lines.append(f"{MODEL},emulated,{node},64,64,1,{degree},1,{told},set by the benchmark")
    return "\n".join(lines) + "\n"


@asynccontextmanager
async def emulated_mesh(tree: Path, workers: int, step_us: int) -> AsyncIterator[Started]:
    """A mesh that is ready; its processes and files go when the block ends. Raises MeshStopped."""
    with tempfile.TemporaryDirectory(prefix="hocket-admission-") as name:
        folder = Path(name)
        (folder / "profile.csv").write_text(profile_csv(step_us))
        (folder / "mesh.toml").write_text(
            f'[control]\nprofiles = ["{folder}/profile.csv"]\n[gpuworker]\ngpu = "emulated"\n'
        )
        process = await _up(tree, workers, folder)
        try:
            await _until_ready(process)
            yield _started(folder)
        finally:
            await _stop(process)


async def _up(tree: Path, workers: int, folder: Path) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "hocket.cli", "up", f"--workers={workers}"]
    command += ["--executor=emulated", f"--profile={folder}/profile.csv"]
    command += [f"--state-dir={folder}/state", "--log-level=warning"]
    environment = {**config.inherited(), "PYTHONPATH": str(tree), "COLUMNS": "200"}
    environment["HOCKET_CONFIG"] = f"{folder}/mesh.toml"
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=tree,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=(folder / "up.log").open("wb"),
        start_new_session=True,
    )


async def _until_ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_S):
            while b"ready" not in (line := await process.stdout.readline()):
                if not line:
                    raise MeshStopped("the mesh of that tree did not start")
    except TimeoutError:
        raise MeshStopped(f"the mesh is not ready after {_START_S:.0f} s") from None


def _started(folder: Path) -> Started:
    gateway, control = (_door(folder / "state", name) for name in ("gateway", "control"))
    pids = {"gateway": gateway.pid, "control": control.pid}
    return Started(gateway.address, control.address, pids)


def _door(state_dir: Path, service: str) -> Endpoint:
    """As announced; earlier trees had one file for all processes of a service."""
    found = endpoints.find(state_dir, service)
    if found is None and (path := state_dir / f"{service}.json").exists():
        found = msgspec.json.decode(path.read_bytes(), type=Endpoint)
    if found is None:
        raise MeshStopped("the mesh of that tree announces no doors")
    return found


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def rss_kib(pid: int) -> int:
    """Resident memory of a process in KiB; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1])
    except FileNotFoundError:
        pass
    return 0


def cpu_ms(pid: int) -> float:
    """Processor time of a process's living threads so far; 0 when it is gone."""
    spent_ns = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            spent_ns += int(thread.read_text().split()[0])
    return spent_ns / 1e6
