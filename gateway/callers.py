"""Whose call it is, as far as the servicers ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeAlias

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


class Callers(Protocol):
    """Looks a caller's tenant up; raises typed errors where it may not do what it asks."""

    def tenant(self, metadata: Metadata) -> str | None:
        """The caller's tenant; None: it sees everybody's requests."""

    def named(self, metadata: Metadata, asked: str) -> str:
        """The tenant that a request is for, where the request itself says `asked`."""

    def operator(self, metadata: Metadata, what: str) -> None:
        """Raises a typed error where the caller may not do what operators do; `what` names it."""


class Anybody:
    """Everybody may say who they are, and see everything."""

    def tenant(self, metadata: Metadata) -> str | None:
        return None

    def named(self, metadata: Metadata, asked: str) -> str:
        return asked

    def operator(self, metadata: Metadata, what: str) -> None:
        return None
