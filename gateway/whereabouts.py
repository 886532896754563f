"""Where the leader of the control plane may be: what is configured, announced or told.

A hint (a replica that does not lead names the one that does) is tried first, once. Then come the
addresses that the sources give, in turn: a leader that went away is not asked for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Source = Callable[[], Sequence[str]]


class Addresses:
    """The sources, asked anew each time; the first one that knows anything is believed."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources
        self._hint = ""
        self._turn = -1

    def next(self) -> str:
        hint, self._hint = self._hint, ""
        if hint:
            return hint
        for source in self._sources:
            if known := [address for address in source() if address]:
                self._turn += 1
                return known[self._turn % len(known)]
        return ""

    def hint(self, address: str) -> None:
        self._hint = address


def listed(text: str) -> tuple[str, ...]:
    """The addresses in a setting: "host:port,host:port"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
