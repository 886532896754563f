"""A pool starts again what died, knows when to give up, and passes signals on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tests.waiting import alive, until

ROOT = Path(__file__).parents[2]
# Each life writes its pid to "<index>.<restarts>"; `ends` says how it ends.
SCRIPT = """
import signal, sys, threading
from pathlib import Path
from gpuworker import pool
pool._PAUSE_US = 1000
folder = Path(sys.argv[1])

def work(index, restarts):
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    (folder / f"{index}.{restarts}").write_text(str(__import__("os").getpid()))
    ends = (folder / f"ends{index}").read_text() if (folder / f"ends{index}").exists() else ""
    if ends:
        return int(ends)
    while not told:
        signal.pause()
    (folder / f"{index}.told").touch()
    return 0

sys.exit(pool.run_pool(int(sys.argv[2]), 0, work, int(sys.argv[3])))
"""


@asynccontextmanager
async def pool(folder: Path, count: int, restarts_max: int = 10) -> AsyncIterator[Process]:
    arguments = (str(folder), str(count), str(restarts_max))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, *arguments, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def pid(folder: Path, index: int, restarts: int = 0) -> int:
    try:
        return int((folder / f"{index}.{restarts}").read_text() or 0)
    except FileNotFoundError:
        return 0


async def test_a_killed_worker_is_started_again_and_knows_it(tmp_path: Path) -> None:
    async with pool(tmp_path, 2) as process:
        await until(lambda: pid(tmp_path, 0) and pid(tmp_path, 1))
        for restarts in range(3):
            os.kill(pid(tmp_path, 0, restarts), signal.SIGKILL)
            await until(partial(pid, tmp_path, 0, restarts + 1))
        assert alive(pid(tmp_path, 1)) and not pid(tmp_path, 1, 1)
        process.terminate()
        _, told = await process.communicate()
        assert process.returncode == 0
        assert b"worker process 0 ended with -9" in told and b"(restart 3)" in told
    assert (tmp_path / "0.told").exists() and (tmp_path / "1.told").exists()


async def test_a_worker_that_dies_too_often_ends_the_pool(tmp_path: Path) -> None:
    (tmp_path / "ends0").write_text("7")
    async with pool(tmp_path, 2, restarts_max=2) as process:
        _, told = await process.communicate()
        assert process.returncode == 7 and b"all stop" in told
    assert pid(tmp_path, 0, 2) and not pid(tmp_path, 0, 3)
    assert not pid(tmp_path, 1) or (tmp_path / "1.told").exists(), "the others hand over"


async def test_who_is_refused_or_wrongly_set_stays_away(tmp_path: Path) -> None:
    (tmp_path / "ends0").write_text("3")
    (tmp_path / "ends1").write_text("2")
    async with pool(tmp_path, 3) as process:
        await until(lambda: all(pid(tmp_path, index) for index in range(3)))
        os.kill(pid(tmp_path, 2), signal.SIGTERM)
        _, told = await process.communicate()
        assert process.returncode in (2, 3)
        assert b"started again" not in told
    assert not pid(tmp_path, 0, 1) and not pid(tmp_path, 1, 1)


async def test_workers_never_outlive_the_pool(tmp_path: Path) -> None:
    async with pool(tmp_path, 2) as process:
        await until(lambda: pid(tmp_path, 0) and pid(tmp_path, 1))
        assert alive(pid(tmp_path, 0)) and alive(pid(tmp_path, 1))
        process.kill()
        await until(lambda: not alive(pid(tmp_path, 0)) and not alive(pid(tmp_path, 1)))
