"""Child processes of `hocket up`: started in groups of their own, watched, started again when they
die, stopped in order.

    start -> runs -> dies -> (its group is killed) -> waits -> runs again, same command -> ...
                          -> has died too often: `given_up` names it, and the mesh ends

A child keeps its command line, so its ports and its files, through all its lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hocket import config
from hocket.launching import mesh_file
from hocket.launching.restarts import RestartRule, Restarts

Report = Callable[[str], None]
_STOP_S = 12.0  # per child; then SIGKILL
_POLL_S = 0.05
_LEFTOVER_POLLS = 100
_TAIL_LINES = 15
_TAIL_BYTES = 16 << 10
_FOLLOW_S = 0.25


@dataclass(eq=False)
class Child:
    """One process, through all its lives, and its log."""

    name: str
    command: tuple[str, ...]
    log: Path
    stop_rank: int  # lower ones stop first
    restarts: Restarts
    process: Process
    began_s: float  # of the event loop's clock
    ended: str = ""  # how its last life ended
    up: asyncio.Event = field(default_factory=asyncio.Event)  # cleared while it is down

    def log_tail(self) -> str:
        """The last lines of its log, each with its name."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        return "\n".join(f"{self.name} | {readable(line)}" for line in lines) or "(no log)"


class Children:
    """Owns the processes of one mesh."""

    def __init__(self, state_dir: Path, report: Report, rule: RestartRule | None = None) -> None:
        """Without a rule nothing is started again: the first death is the last."""
        self._state_dir = state_dir
        self._report = report
        self._rule = rule or RestartRule(most=0)
        self._all: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._given_up: asyncio.Future[Child] = asyncio.get_running_loop().create_future()

    @property
    def all(self) -> tuple[Child, ...]:
        """In the order of their first start."""
        return tuple(self._all)

    async def start(self, name: str, command: Sequence[str], *, stop_rank: int) -> Child:
        """Starts a process; what it writes goes to `<state_dir>/logs/<name>.log`."""
        folder = self._state_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.log"
        path.write_bytes(b"")
        process = await _spawn(command, path)
        loop = asyncio.get_running_loop()
        restarts = Restarts(self._rule)
        child = Child(name, tuple(command), path, stop_rank, restarts, process, loop.time())
        child.up.set()
        self._all.append(child)
        self._record()
        self._tasks.append(loop.create_task(self._follow(child)))
        return child

    def supervise(self) -> None:
        """From now on what dies is started again. Children of later starts are not looked after."""
        loop = asyncio.get_running_loop()
        for child in self._all:
            task = loop.create_task(self._keep_alive(child))
            task.add_done_callback(self._stopped_looking)
            self._tasks.append(task)

    async def given_up(self) -> Child:
        """Waits until a child has died too often; raises what broke the supervision itself."""
        return await asyncio.shield(self._given_up)

    async def stop(self) -> None:
        """Stops every child in order; kills those that take too long, and what they left behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in sorted(self._all, key=lambda one: one.stop_rank):
            await _stop(child, self._report)
        self._all.clear()
        mesh_file.remove(self._state_dir)

    async def _keep_alive(self, child: Child) -> None:
        """Starts a child again whenever it dies, until that has happened too often."""
        while True:
            child.ended = _ending(await child.process.wait())
            child.up.clear()
            # What it has started itself must be gone before a successor of the same names comes.
            _signal_group(child.process.pid, signal.SIGKILL)
            if not await self._revive(child):
                if not self._given_up.done():
                    self._given_up.set_result(child)
                return

    async def _revive(self, child: Child) -> bool:
        """Starts a child that has died, after its wait; False when it has died too often."""
        loop = asyncio.get_running_loop()
        while True:
            wait_s = child.restarts.died(loop.time(), loop.time() - child.began_s)
            self._record()
            if wait_s is None:
                self._report(f"{child.name} {child.ended}, too often to be started again")
                return False
            count = child.restarts.count
            self._report(
                f"{child.name} {child.ended}; starts again in {wait_s:g} s (restart {count})"
            )
            await asyncio.sleep(wait_s)
            child.began_s = loop.time()
            spawning = loop.create_task(_spawn(child.command, child.log))
            try:
                child.process = await asyncio.shield(spawning)
            except asyncio.CancelledError:
                child.process = await spawning  # `stop` has to find it
                raise
            except OSError as error:  # no memory, too many files: it may be better later
                child.ended = f"could not be started ({error})"
                continue
            child.up.set()
            self._record()
            return True

    def _stopped_looking(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._given_up.done():
            return
        if (error := task.exception()) is not None:
            self._given_up.set_exception(error)

    def _record(self) -> None:
        known = [
            mesh_file.Process(
                name=child.name,
                pid=child.process.pid if child.up.is_set() else 0,
                command=" ".join(child.command),
                restarts=child.restarts.count,
                ended=child.ended,
            )
            for child in self._all
        ]
        mesh_file.write(self._state_dir, known)

    async def _follow(self, child: Child) -> None:
        """Reports errors that a child logs, until cancelled."""
        with child.log.open("rb") as log:
            while True:
                for line in log.readlines():
                    if is_error(line):
                        text = readable(line.decode(errors="replace").rstrip())
                        self._report(f"{child.name} | {text}")
                await asyncio.sleep(_FOLLOW_S)


async def _spawn(command: Sequence[str], log: Path) -> Process:
    environment = {"OMP_NUM_THREADS": "1", **config.inherited()}
    with log.open("ab") as file:
        return await asyncio.create_subprocess_exec(
            *command, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def _ending(code: int) -> str:
    """How a process ended, in words: its exit status, or the signal that killed it."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def is_error(line: bytes) -> bool:
    """Whether a log line tells of an error."""
    try:
        level = msgspec.json.decode(line, type=_LogLine).level
    except msgspec.DecodeError:
        return b"Traceback" in line or b"[ERR]" in line or b"[FTL]" in line
    return level in ("error", "critical")


def readable(line: str) -> str:
    """A JSON log line as people read it; any other line as it is."""
    try:
        told = msgspec.json.decode(line, type=_LogLine)
    except msgspec.DecodeError:
        return line
    return f"{told.level}: {told.message}" + (f"\n{told.exception}" if told.exception else "")


async def stop_leftovers(state_dir: Path, report: Report) -> None:
    """Stops the children of a launcher that was killed."""
    known = mesh_file.read(state_dir)
    for one in reversed(known):  # the broker last
        if _command_of(one.pid) != one.command:
            continue
        report(f"stopping {one.name} (pid {one.pid}), left by a mesh that was killed")
        _signal_group(one.pid, signal.SIGTERM)
        for _ in range(_LEFTOVER_POLLS):
            if _command_of(one.pid) != one.command:
                break
            await asyncio.sleep(_POLL_S)
        _signal_group(one.pid, signal.SIGKILL)
    mesh_file.remove(state_dir)


class _LogLine(msgspec.Struct, frozen=True):
    level: str
    message: str
    exception: str = ""


async def _stop(child: Child, report: Report) -> None:
    if child.process.returncode is None:
        with suppress(ProcessLookupError):
            child.process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await child.process.wait()
        except TimeoutError:
            report(f"{child.name} does not stop; killing it")
    # The group outlives its leader when that one crashed before it could stop its own children.
    _signal_group(child.process.pid, signal.SIGKILL)
    await child.process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _command_of(pid: int) -> str:
    if Path("/proc/self").exists():
        try:
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return ""
        return raw.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    ps = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip()
