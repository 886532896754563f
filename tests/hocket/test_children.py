"""Child processes: watched, stopped in order, none left behind. The children are small scripts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from hocket.errors import MeshStopped
from hocket.launching import mesh_file
from hocket.launching.broker import free_port
from hocket.launching.children import Child, Children, is_error, readable, stop_leftovers
from hocket.launching.launcher import MeshPlan, mesh
from hocket.launching.restarts import RestartRule
from tests.waiting import alive, until

READY = "import signal, sys; print('ready', flush=True); "
OBEDIENT = READY + "signal.pause()"
GRANDPARENT = (
    "import subprocess, sys, signal; c = subprocess.Popen([sys.executable, '-c',"
    " 'import signal; signal.signal(15, signal.SIG_IGN); signal.pause()']);"
    " print(c.pid, flush=True); signal.pause()"
)
LISTENER = (
    "import socket, subprocess, sys, signal; c = subprocess.Popen([sys.executable, '-c',"
    " 'import signal; signal.signal(15, signal.SIG_IGN); signal.pause()']);"
    " s = socket.create_server(('127.0.0.1', {port})); print(c.pid, 'listens', flush=True);"
    " signal.pause()"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def first_line(child: Child) -> str:
    await until(lambda: child.log.read_text().endswith("\n"))
    return child.log.read_text().strip()


def gone(pid: int) -> bool:
    return not alive(pid)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
async def children(tmp_path: Path, told: list[str]) -> Children:
    return Children(tmp_path, told.append)


async def test_children_stop_in_order(children: Children, told: list[str], tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "def bye(*_):\n"
        "    open(sys.argv[1], 'a').write(sys.argv[2])\n"
        "    sys.exit(0)\n"
        "signal.signal(15, bye)\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    order = tmp_path / "order"
    for name, rank in (("nats", 3), ("control", 1), ("gateway", 0), ("workers", 2)):
        command = [*python(code), str(order), name[0]]
        await first_line(await children.start(name, command, stop_rank=rank))
    await children.stop()
    assert order.read_text() == "gcwn"
    assert told == [] and not (tmp_path / "mesh.json").exists()


async def test_what_a_crashed_child_left_behind_is_killed(children: Children) -> None:
    child = await children.start("workers", python(GRANDPARENT), stop_rank=0)
    grandchild = int(await first_line(child))
    child.process.kill()
    await child.process.wait()
    os.kill(grandchild, 0)
    await children.stop()
    await until(lambda: gone(grandchild))
    assert not alive(grandchild)


async def test_what_is_killed_comes_back_with_the_same_command(
    tmp_path: Path, told: list[str]
) -> None:
    """kill -9 of a process that listens: again on the same port, after what it left is gone."""
    children = Children(tmp_path, told.append, RestartRule(first_s=0.01))
    port = free_port()
    child = await children.start("gateway", python(LISTENER.format(port=port)), stop_rank=0)
    await until(lambda: "listens" in child.log.read_text())
    children.supervise()
    first, grandchild = child.process.pid, int(child.log.read_text().split()[0])
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.log.read_text().count("listens") == 2)
    assert child.process.pid != first and not alive(grandchild)
    assert told[0].startswith("gateway was killed by SIGKILL; starts again in")
    (known,) = mesh_file.read(tmp_path)
    assert (known.pid, known.restarts) == (child.process.pid, 1)
    assert known.ended == "was killed by SIGKILL"
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await children.stop()
    assert not alive(child.process.pid) and mesh_file.read(tmp_path) == []


async def test_what_dies_again_and_again_is_given_up(tmp_path: Path, told: list[str]) -> None:
    children = Children(tmp_path, told.append, RestartRule(first_s=0.01, longest_s=0.01, most=3))
    await children.start("control", python("raise SystemExit(3)"), stop_rank=1)
    steady = await children.start("nats", python(OBEDIENT), stop_rank=2)
    children.supervise()
    dead = await children.given_up()
    assert dead.name == "control" and dead.restarts.count == 3
    assert told[-1] == "control ended with status 3, too often to be started again"
    assert mesh_file.read(tmp_path)[0].pid == 0, "it is down"
    await children.stop()
    assert not alive(steady.process.pid)


async def test_what_cannot_be_started_is_tried_again_and_given_up(
    tmp_path: Path, told: list[str]
) -> None:
    program = tmp_path / "service"
    program.write_text("#!/bin/sh\nsleep 3600\n")
    program.chmod(0o755)
    rule = RestartRule(first_s=0.01, longest_s=0.01, most=2)
    children = Children(tmp_path, told.append, rule)
    child = await children.start("control", [str(program)], stop_rank=0)
    children.supervise()
    program.unlink()
    os.killpg(child.process.pid, signal.SIGKILL)
    assert await children.given_up() is child
    assert "could not be started" in child.ended and child.restarts.count == 2
    await children.stop()


async def test_supervision_that_breaks_is_told(tmp_path: Path, told: list[str]) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    children = Children(folder, told.append, RestartRule(first_s=0.01))
    child = await children.start("control", python(OBEDIENT), stop_rank=0)
    children.supervise()
    shutil.rmtree(folder)
    child.process.kill()
    with pytest.raises(FileNotFoundError):
        await children.given_up()
    folder.mkdir()
    await children.stop()


async def test_a_stop_while_a_process_waits_for_its_restart_starts_nothing(
    tmp_path: Path, told: list[str]
) -> None:
    children = Children(tmp_path, told.append, RestartRule(first_s=3600.0))
    child = await children.start("control", python(READY), stop_rank=1)
    children.supervise()
    await until(lambda: told)
    await children.stop()
    assert child.log.read_text() == "ready\n" and len(told) == 1


async def test_an_error_in_a_log_is_told(children: Children, told: list[str]) -> None:
    line = '{"level":"error","message":"out of memory"}'
    await children.start("workers", python(f"print('{line}')"), stop_rank=0)
    await until(lambda: told)
    assert told == ["workers | error: out of memory"]
    await children.stop()


async def test_leftovers_of_a_killed_launcher_are_stopped(
    children: Children, told: list[str], tmp_path: Path
) -> None:
    child = await children.start("control", python(OBEDIENT), stop_rank=0)
    await first_line(child)
    await stop_leftovers(tmp_path, told.append)
    assert await child.process.wait() == -signal.SIGTERM
    assert "left by a mesh that was killed" in told[0]
    await stop_leftovers(tmp_path, told.append)
    assert len(told) == 1
    await children.stop()


async def test_a_number_taken_over_by_another_process_is_left_alone(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "mesh.json").write_text(
        f'[{{"name":"control","pid":{os.getpid()},"command":"something else"}}]'
    )
    await stop_leftovers(tmp_path, told.append)
    assert told == []


async def test_a_second_mesh_in_one_folder_is_refused(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "mesh.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(MeshStopped, match="a mesh is running in"):
            async with mesh(MeshPlan(state_dir=tmp_path, workers=1), print):
                pass


async def test_a_service_that_does_not_start_is_told_with_its_log(
    tmp_path: Path, nats_url: str
) -> None:
    plan = MeshPlan(state_dir=tmp_path, workers=1, nats_url=nats_url, policy="best-of-all")
    with pytest.raises(MeshStopped, match="control did not start") as caught:
        async with mesh(plan, print):
            pass
    assert "best-of-all" in caught.value.message


def test_log_lines() -> None:
    assert is_error(b'{"level":"critical","message":"x"}\n')
    assert not is_error(b'{"level":"warning","message":"x"}\n')
    assert is_error(b"Traceback (most recent call last):\n")
    assert is_error(b"[12] 2026/11/21 07:00:00 [FTL] no disk\n")
    assert not is_error(b"anything\n")
    assert readable('{"level":"error","message":"x","exception":"y"}') == "error: x\ny"
    assert readable("plain") == "plain"
