"""Where the services of one state folder listen: `<state_dir>/<service>@<pid>.json`, one file for
each process, so that two gateways never overwrite each other.

A service announces its door once it is ready to serve, so the file is also the readiness signal of
`hocket up`. A replica of control that does not lead announces that it stands by: it answers no
calls, and counts only where it is asked for. A file left by a dead process counts as absent; the
next announcement removes it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

STANDBY = "standby"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An open door."""

    address: str  # "host:port"
    pid: int  # the process that opened it
    role: str = ""  # of a replica of control: "leader" or "standby"


def announce(state_dir: Path, service: str, address: str, role: str = "") -> None:
    """Tells other processes where `service` listens. Written whole or not at all."""
    state_dir.mkdir(parents=True, exist_ok=True)
    for path, known in _announced(state_dir, service):
        if not _lives(known.pid):
            path.unlink(missing_ok=True)
    target = _path(state_dir, service, os.getpid())
    endpoint = Endpoint(address=address, pid=os.getpid(), role=role)
    draft = target.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(endpoint) + b"\n")
    draft.replace(target)


def withdraw(state_dir: Path, service: str) -> None:
    """Takes this process's own announcement back."""
    _path(state_dir, service, os.getpid()).unlink(missing_ok=True)


def find(state_dir: Path, service: str) -> Endpoint | None:
    """A door of `service`, the newest that serves; None when no living process has one."""
    found = living(state_dir, service)
    return found[0] if found else None


def living(state_dir: Path, service: str, *, standing_by: bool = False) -> tuple[Endpoint, ...]:
    """All doors of `service` whose processes live, the newest first; of those that stand by only
    where they are wanted, too.
    """
    known = (e for _, e in _announced(state_dir, service) if _lives(e.pid))
    return tuple(e for e in known if standing_by or e.role != STANDBY)


def clear(state_dir: Path, service: str) -> None:
    """Removes all announcements of a service, whoever made them."""
    for path, _ in _announced(state_dir, service):
        path.unlink(missing_ok=True)


def _announced(state_dir: Path, service: str) -> list[tuple[Path, Endpoint]]:
    """As written, the newest first; files that cannot be read are left out."""
    found: list[tuple[int, Path, Endpoint]] = []
    begins, ends = f"{service}@", ".json"
    try:
        names = os.listdir(state_dir)
    except OSError:  # there is none, or none of ours
        return []
    for name in names:
        if not (name.startswith(begins) and name.endswith(ends)):
            continue
        path = state_dir / name
        try:
            endpoint = msgspec.json.decode(path.read_bytes(), type=Endpoint)
            found.append((path.stat().st_mtime_ns, path, endpoint))
        except (OSError, msgspec.DecodeError):
            continue
    return [(path, endpoint) for _, path, endpoint in sorted(found, key=lambda f: -f[0])]


def _path(state_dir: Path, service: str, pid: int) -> Path:
    return state_dir / f"{service}@{pid}.json"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
