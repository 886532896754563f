"""Where the services of one state folder listen: `<state_dir>/<service>.json`.

A service announces its door once it is ready to serve, so the file is also the readiness signal of
`hocket up`. A file left by a dead process counts as absent.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An open door."""

    address: str  # "host:port"
    pid: int  # the process that opened it


def announce(state_dir: Path, service: str, address: str) -> None:
    """Tells other processes where `service` listens. Written whole or not at all."""
    state_dir.mkdir(parents=True, exist_ok=True)
    target = _path(state_dir, service)
    draft = target.with_suffix(f".{os.getpid()}.draft")
    draft.write_bytes(msgspec.json.encode(Endpoint(address=address, pid=os.getpid())) + b"\n")
    draft.replace(target)


def withdraw(state_dir: Path, service: str) -> None:
    """Takes the announcement back, unless another process has announced itself since."""
    endpoint = read(state_dir, service)
    if endpoint is not None and endpoint.pid == os.getpid():
        _path(state_dir, service).unlink(missing_ok=True)


def find(state_dir: Path, service: str) -> Endpoint | None:
    """Where `service` listens; None when it has not announced itself or its process is gone."""
    endpoint = read(state_dir, service)
    return endpoint if endpoint is not None and _lives(endpoint.pid) else None


def read(state_dir: Path, service: str) -> Endpoint | None:
    """The announcement as written, whether or not its process still lives."""
    try:
        return msgspec.json.decode(_path(state_dir, service).read_bytes(), type=Endpoint)
    except (OSError, msgspec.DecodeError):
        return None


def _path(state_dir: Path, service: str) -> Path:
    return state_dir / f"{service}.json"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
