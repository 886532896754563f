"""`python -m bench hosts`: the README's commands on three hosts, which are network namespaces here.

    a   nats-server, control, gateway, the callers
    b   a worker
    c   a worker

    1   a picture is made by a group of workers of both hosts
    2   host c is lost with requests under way, and comes back
    3   c's cable is pulled with requests under way, and plugged in again

Every request of all three ends well, and both workers work in the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from bench.chaos.namespaces import Host, hosts, possible
from hocket.errors import MeshStopped
from hocket.launching.broker import nats_server_binary

console = Console(highlight=False, soft_wrap=True)
_READY_S = 90.0
_PLAY_S = 170.0
_PARTITION_S = 8.0
_PAUSE_S = 0.5
_TRIES = 6  # until a group stands across the hosts: the planner is free to choose


@dataclass
class HostFindings:
    """What was seen."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def hosts_command() -> None:
    """Three hosts (network namespaces): a group across two, one lost, a partition. Needs root."""
    if not possible():
        console.print("network namespaces need root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and iproute2")
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="hocket-hosts-", ignore_cleanup_errors=True) as name:
        found = asyncio.run(three_hosts(Path(name), console.print))
    for problem in found.problems:
        console.print(f"PROBLEM {problem}", markup=False)
    raise typer.Exit(1 if found.problems else 0)


async def three_hosts(folder: Path, told: Callable[[str], None]) -> HostFindings:
    """Plays all of it; raises MeshStopped where the hosts do not come up."""
    found = HostFindings()

    def tell(line: str) -> None:
        found.lines.append(line)
        told(line)

    aliases = {"broker": "host-a", "control": "host-a", "gateway": "host-a"}
    with hosts(folder, ("host-a", "host-b", "host-c"), aliases) as named:
        a, b, c = named.values()
        play = _Play(a, b, c, tell, found.problems)
        try:
            await play.start()
            await play.group_across_hosts()
            await play.host_lost()
            await play.partition()
        finally:
            for host in (a, c, b):
                host.connect(True)
                await host.stop()
    return found


class _Play:
    def __init__(
        self, a: Host, b: Host, c: Host, tell: Callable[[str], None], problems: list[str]
    ) -> None:
        self._a, self._b, self._c = a, b, c
        self._tell, self._problems = tell, problems

    async def start(self) -> None:
        """The commands of the README, each on its host."""
        at = ["--nats-url", "nats://broker:4222"]
        await self._a.start("nats", [str(nats_server_binary()), "-js"])
        await self._a.start("control", _python("control", *at, "--listen", "0.0.0.0:50052"))
        for host in (self._b, self._c):
            await self._start_worker(host)
        door = ["--control", "control:50052", "--listen", "0.0.0.0:50051"]
        await self._a.start("gateway", _python("gateway", *at, *door))
        self._tell(f"workers: {', '.join(await self._workers(2))}")

    async def group_across_hosts(self) -> None:
        """Calls with a tight deadline, one at a time, until one was made by both workers."""
        for number in range(_TRIES):
            ends = await self._calls(f"wide-{number}", count=1, side=256, steps=8, deadline_s=1.6)
            wide = [g for end in ends for g in end["groups"] if len(g) > 1]
            if wide:
                self._tell(f"a group across hosts: {' and '.join(wide[0])}")
                return
        self._problems.append("no group of workers of both hosts was made")

    async def host_lost(self) -> None:
        """All processes of host c are killed and its cable pulled; then it starts again."""

        async def lose() -> None:
            self._c.connect(False)
            await self._c.crash()
            self._tell("host c is lost")

        await self._calls("lost", count=4, side=128, steps=40, meanwhile=lose)
        await self._workers(1)
        self._c.connect(True)
        await self._start_worker(self._c)
        self._tell(f"host c is back: {', '.join(await self._workers(2))}")

    async def partition(self) -> None:
        """Host c's cable is pulled; its worker goes on alone, and is heard of again later."""

        async def pull() -> None:
            self._c.connect(False)
            self._tell("host c is cut off")
            await asyncio.sleep(_PARTITION_S)
            self._c.connect(True)
            self._tell("host c is linked again")

        await self._calls("cut", count=4, side=128, steps=40, meanwhile=pull)
        names = await self._workers(2)
        used: set[str] = set()
        for number in range(_TRIES):  # one that failed meanwhile is tried again after a while only
            ends = await self._calls(f"healed-{number}", count=6, side=128, steps=8)
            used |= {worker for end in ends for group in end["groups"] for worker in group}
            if used == set(names):
                self._tell(f"after the partition both worked: {', '.join(names)}")
                return
        self._problems.append(f"after the partition only {sorted(used)} worked")

    async def _start_worker(self, host: Host) -> None:
        options = ["--nats-url", "nats://broker:4222", "--count", "1", "--advertise", host.address]
        await host.start("workers", _python("gpuworker", *options))

    async def _calls(
        self,
        prefix: str,
        *,
        count: int,
        side: int,
        steps: int,
        deadline_s: float = 0.0,
        meanwhile: Callable[[], Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Runs calls from host a; `meanwhile` begins when all are under way."""
        command = self._a.entered(_python("bench.chaos.remote", "gateway:50051"))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert process.stdin is not None and process.stdout is not None
        for number in range(count):
            line = f"{prefix}-{number} {side} {steps} {number} {deadline_s}\n"
            process.stdin.write(line.encode())
        process.stdin.close()
        ends: list[dict[str, Any]] = []
        async with asyncio.timeout(_PLAY_S):
            while line_read := await process.stdout.readline():
                if line_read.startswith(b"under way"):
                    if meanwhile is not None:
                        await meanwhile()
                    continue
                ends.append(json.loads(line_read))
            await process.wait()
        for end in ends:
            if end["ended"] != "finished":
                self._problems.append(f"{end['key']}: {end['ended']}: {end['problem']}")
        if len(ends) != count:
            self._problems.append(f"{prefix}: {count - len(ends)} calls without an end")
        self._tell(f"{prefix}: {sum(e['ended'] == 'finished' for e in ends)} of {count} finished")
        return ends

    async def _workers(self, count: int) -> list[str]:
        """Names of the living workers once there are so many; raises MeshStopped."""
        code = (
            "import asyncio; from bench.chaos.strikes import cluster_state\n"
            "state = asyncio.run(cluster_state('control:50052'))\n"
            "print(*(w.name for w in state.workers) if state else ())"
        )
        command = self._a.entered([sys.executable, "-c", code])
        names: list[str] = []
        try:
            async with asyncio.timeout(_READY_S):
                while len(names) != count:
                    await asyncio.sleep(_PAUSE_S)
                    process = await asyncio.create_subprocess_exec(
                        *command, stdout=asyncio.subprocess.PIPE
                    )
                    names = (await process.communicate())[0].decode().split()
        except TimeoutError:
            logs = "\n".join(
                host.log_tail(name)
                for host in (self._a, self._b, self._c)
                for name in host.processes
            )
            told = f"workers {names} instead of {count} after {_READY_S:.0f} s\n{logs}"
            raise MeshStopped(told) from None
        return names


def _python(module: str, *options: str) -> list[str]:
    return [sys.executable, "-m", module, *options]
