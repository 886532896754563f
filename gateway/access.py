"""Whose call it is: the tenant of its API key, where the gateway has a file of keys.

Without a file everybody may say who they are. With one, a call without a key is UNAUTHENTICATED; a
call that names another tenant than its key's is PERMISSION_DENIED; and what a tenant did not start
is, to that tenant, not there. What operators do (workflows are registered) takes an operator's key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from hocket.clock import Clock
from hocket.errors import AccessDenied, NotAuthenticated, WrongConfig
from hocket.security import api_keys

log = logging.getLogger(__name__)

_LOOK_EVERY_US = 1_000_000
_HEADERS = ("authorization", "x-api-key")
_BEARER = "bearer "


class Access:
    """Looks a caller's tenant up. One a gateway."""

    def __init__(self, file: Path | None, clock: Clock) -> None:
        """Raises WrongConfig where the file cannot be read."""
        self._file = file
        self._clock = clock
        self._looked_us = clock.now_us()
        self._stamp = _stamp(file)
        self._keys = api_keys.read(file) if file is not None else api_keys.ApiKeys()

    def tenant(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """The caller's tenant; None where anybody may name any. Raises NotAuthenticated."""
        key = self._key(metadata)
        return None if key is None else key.tenant

    def named(self, metadata: Iterable[tuple[str, str | bytes]], asked: str) -> str:
        """The tenant that a request is for; `asked` is what it says itself, "" where nothing.

        Raises NotAuthenticated and AccessDenied.
        """
        tenant = self.tenant(metadata)
        if tenant is None or asked in ("", tenant):
            return asked if tenant is None else tenant
        raise AccessDenied(what=f"tenant {asked!r}", who=f"the API key of tenant {tenant!r}")

    def operator(self, metadata: Iterable[tuple[str, str | bytes]], what: str) -> None:
        """Whether the caller may do `what`: with a file of keys, those flagged `operator`.

        Raises NotAuthenticated and AccessDenied.
        """
        key = self._key(metadata)
        if key is not None and not key.operator:
            raise AccessDenied(what=what, who=f"the API key of tenant {key.tenant!r}")

    def _key(self, metadata: Iterable[tuple[str, str | bytes]]) -> api_keys.ApiKey | None:
        """The caller's key; None where there is no file of keys. Raises NotAuthenticated."""
        if self._file is None:
            return None
        self._look(self._file)
        secret = _secret(metadata)
        if not secret:
            raise NotAuthenticated("send an API key: authorization: Bearer KEY, or x-api-key: KEY")
        key = self._keys.of(secret)
        if key is None:
            raise NotAuthenticated("the API key is not known here, or was revoked")
        return key

    def _look(self, file: Path) -> None:
        """Reads the file again when it has changed; a bad one is told, and the old keys stay."""
        now_us = self._clock.now_us()
        if now_us - self._looked_us < _LOOK_EVERY_US:
            return
        self._looked_us = now_us
        stamp = _stamp(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = api_keys.read(file)
        except WrongConfig as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("read %d API keys", len(self._keys.keys))


def _stamp(file: Path | None) -> tuple[int, int, int]:
    try:
        found = file.stat() if file is not None else None
    except OSError:
        found = None
    return (0, 0, 0) if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def _secret(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    found = {key: value for key, value in metadata if key in _HEADERS and isinstance(value, str)}
    named = found.get("authorization", "")
    if named[: len(_BEARER)].lower() == _BEARER:
        return named[len(_BEARER) :].strip()
    return found.get("x-api-key", "").strip()
