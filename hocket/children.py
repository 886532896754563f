"""Child processes of `hocket up`: started in groups of their own, watched, stopped in order."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hocket import config

Report = Callable[[str], None]
_STOP_S = 12.0  # per child; then SIGKILL
_POLL_S = 0.05
_LEFTOVER_POLLS = 100
_TAIL_LINES = 15
_TAIL_BYTES = 16 << 10
_FOLLOW_S = 0.25
_FILE = "mesh.json"


class _Leftover(msgspec.Struct, frozen=True):
    name: str
    pid: int
    command: str  # tells a process that took over the number from ours


@dataclass(frozen=True)
class Child:
    """One process and its log."""

    name: str
    process: Process
    log: Path
    command: str
    stop_rank: int  # lower ones stop first
    vital: bool  # the mesh cannot go on without it

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

    def __init__(self, state_dir: Path, report: Report) -> None:
        self._state_dir = state_dir
        self._report = report
        self._all: list[Child] = []
        self._followers: list[asyncio.Task[None]] = []

    async def start(
        self, name: str, command: Sequence[str], *, stop_rank: int, vital: bool = True
    ) -> Child:
        """Starts a process; what it writes goes to `<state_dir>/logs/<name>.log`."""
        folder = self._state_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **config.inherited()}
        path = folder / f"{name}.log"
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        child = Child(name, process, path, " ".join(command), stop_rank, vital)
        self._all.append(child)
        self._record()
        self._followers.append(asyncio.get_running_loop().create_task(self._follow(child)))
        return child

    async def vital_death(self) -> Child:
        """Waits until a child dies without which the mesh cannot go on; reports the others."""
        waits = {
            asyncio.get_running_loop().create_task(child.process.wait()): child
            for child in self._all
        }
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for child in [waits.pop(task) for task in done]:
                    if child.vital:
                        return child
                    self._report(f"{child.name} stopped unexpectedly\n{child.log_tail()}")
            raise AssertionError("a mesh has vital children")
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def stop(self) -> None:
        """Stops every child in order; kills those that take too long, and what they left behind."""
        for task in self._followers:
            task.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        for child in sorted(self._all, key=lambda one: one.stop_rank):
            await _stop(child, self._report)
        self._all.clear()
        (self._state_dir / _FILE).unlink(missing_ok=True)

    def _record(self) -> None:
        known = [_Leftover(c.name, c.process.pid, c.command) for c in self._all]
        (self._state_dir / _FILE).write_bytes(msgspec.json.encode(known))

    async def _follow(self, child: Child) -> None:
        """Reports errors that a child logs, until cancelled."""
        with child.log.open("rb") as log:
            while True:
                for line in log.readlines():
                    if is_error(line):
                        text = readable(line.decode(errors="replace").rstrip())
                        self._report(f"{child.name} | {text}")
                await asyncio.sleep(_FOLLOW_S)


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
    try:
        known = msgspec.json.decode((state_dir / _FILE).read_bytes(), type=list[_Leftover])
    except (OSError, msgspec.DecodeError):
        return
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
    (state_dir / _FILE).unlink(missing_ok=True)


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
