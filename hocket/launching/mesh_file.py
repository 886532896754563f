"""`<state_dir>/mesh.json`: the processes of a mesh, as their launcher last knew them.

The next launcher stops by it what a killed one left behind; `hocket status` shows it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

_FILE = "mesh.json"


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process."""

    name: str
    pid: int  # 0: it is down
    command: str  # tells a process that took over the number from ours
    restarts: int = 0  # how often it was started again
    ended: str = ""  # how its last life ended


def write(state_dir: Path, processes: list[Process]) -> None:
    """Written whole or not at all."""
    draft = state_dir / f"{_FILE}.draft"
    draft.write_bytes(msgspec.json.encode(processes))
    draft.replace(state_dir / _FILE)


def read(state_dir: Path) -> list[Process]:
    """Empty where no mesh has been left or runs."""
    try:
        return msgspec.json.decode((state_dir / _FILE).read_bytes(), type=list[Process])
    except (OSError, msgspec.DecodeError):
        return []


def remove(state_dir: Path) -> None:
    (state_dir / _FILE).unlink(missing_ok=True)
