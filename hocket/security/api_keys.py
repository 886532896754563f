"""API keys of a gateway's callers: each belongs to a tenant, and only its digest is kept.

A key is 256 random bits, so that a plain SHA-256 of it can neither be reversed nor guessed; the
file names tenant and digest, never the key. Gateways look whether the file changed, so that a key
is added or revoked without a restart.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

import msgspec

from hocket.errors import WrongConfig

_PREFIX = "hk_"
_KEY_BYTES = 32
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key, as the file has it."""

    id: str  # names the key to people
    tenant: str
    sha256: str  # of the whole key, in hex


class ApiKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys of a cluster."""

    keys: tuple[ApiKey, ...] = ()

    def tenant_of(self, secret: str) -> str | None:
        """Whose key that is; None for a wrong one."""
        digest = _digest(secret)
        return next((key.tenant for key in self.keys if key.sha256 == digest), None)


def read(file: Path) -> ApiKeys:
    """The keys in a file; raises WrongConfig."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=ApiKeys)
    except OSError as error:
        allowed = f"a file that `hocket keys add` made ({error.strerror})"
        raise WrongConfig("api_keys", str(file), allowed) from None
    except msgspec.MsgspecError as error:
        raise WrongConfig("api_keys", str(file), f"a file of API keys ({error})") from None


def add(file: Path, tenant: str) -> tuple[str, str]:
    """Adds a key for a tenant; returns its id and the key, which is told this once."""
    if re.fullmatch(_NAME, tenant) is None:
        raise WrongConfig("tenant", tenant, f"a name matching {_NAME}")
    known = read(file) if file.exists() else ApiKeys()
    name = secrets.token_hex(4)
    secret = f"{_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}"
    fresh = ApiKey(id=name, tenant=tenant, sha256=_digest(secret))
    _write(file, ApiKeys(keys=(*known.keys, fresh)))
    return name, secret


def revoke(file: Path, name: str) -> ApiKey:
    """Takes a key back by its id; raises WrongConfig where there is none of that id."""
    known = read(file)
    found = next((key for key in known.keys if key.id == name), None)
    if found is None:
        allowed = ", ".join(key.id for key in known.keys) or "an id; the file has no keys"
        raise WrongConfig("id", name, allowed)
    _write(file, ApiKeys(keys=tuple(key for key in known.keys if key.id != name)))
    return found


def _write(file: Path, keys: ApiKeys) -> None:
    """At once: a gateway that reads meanwhile sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as into:
        into.write(msgspec.json.format(msgspec.json.encode(keys), indent=2))
    fresh.replace(file)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
