"""API keys of a gateway's callers: each belongs to a tenant, and only its digest is kept.

A key is 256 random bits, so that a plain SHA-256 of it can neither be reversed nor guessed; the
file names tenant and digest, never the key. Gateways look whether the file changed, so that a key
is added or revoked without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hocket.errors import WrongConfig

_PREFIX = "hk_"
_KEY_BYTES = 32
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ApiKey(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One key, as the file has it."""

    id: str  # names the key to people
    tenant: str
    sha256: str  # of the whole key, in hex
    operator: bool = False  # it may register workflows


class ApiKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys of a cluster."""

    keys: tuple[ApiKey, ...] = ()

    def tenant_of(self, secret: str) -> str | None:
        """Whose key that is; None for a wrong one."""
        key = self.of(secret)
        return None if key is None else key.tenant

    def of(self, secret: str) -> ApiKey | None:
        """What is known of a key; None for a wrong one."""
        digest = _digest(secret)
        return next((key for key in self.keys if key.sha256 == digest), None)


def read(file: Path) -> ApiKeys:
    """The keys in a file; raises WrongConfig."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=ApiKeys)
    except OSError as error:
        allowed = f"a file that `hocket keys add` made ({error.strerror})"
        raise WrongConfig("api_keys", str(file), allowed) from None
    except msgspec.MsgspecError as error:
        raise WrongConfig("api_keys", str(file), f"a file of API keys ({error})") from None


def add(file: Path, tenant: str, *, operator: bool = False) -> tuple[str, str]:
    """Adds a key for a tenant; returns its id and the key, which is told this once."""
    if re.fullmatch(_NAME, tenant) is None:
        raise WrongConfig("tenant", tenant, f"a name matching {_NAME}")
    name = secrets.token_hex(4)
    secret = f"{_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}"
    fresh = ApiKey(id=name, tenant=tenant, sha256=_digest(secret), operator=operator)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file):
        known = read(file) if file.exists() else ApiKeys()
        _write(file, ApiKeys(keys=(*known.keys, fresh)))
    return name, secret


def revoke(file: Path, name: str) -> ApiKey:
    """Takes a key back by its id; raises WrongConfig where there is none of that id."""
    read(file)  # raises where there is none, perhaps not even its folder
    with _alone(file):
        known = read(file)
        found = next((key for key in known.keys if key.id == name), None)
        if found is None:
            allowed = ", ".join(key.id for key in known.keys) or "an id; the file has no keys"
            raise WrongConfig("id", name, allowed)
        _write(file, ApiKeys(keys=tuple(key for key in known.keys if key.id != name)))
    return found


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile; held on its folder, for the file is replaced."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(file: Path, keys: ApiKeys) -> None:
    """At once: a gateway that reads meanwhile sees the old file or the new one, and may read it
    still: owner and mode stay as they are.
    """
    before = file.stat() if file.exists() else None
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # for its owner alone
    try:
        with os.fdopen(handle, "wb") as into:
            into.write(msgspec.json.format(msgspec.json.encode(keys), indent=2))
            if before is not None:
                os.fchown(into.fileno(), before.st_uid, before.st_gid)
                os.fchmod(into.fileno(), stat.S_IMODE(before.st_mode))
        Path(name).replace(file)
    except PermissionError as error:
        Path(name).unlink(missing_ok=True)
        told = f"a file that this user may write and leave to its owner ({error.strerror})"
        raise WrongConfig("api_keys", str(file), told) from None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
