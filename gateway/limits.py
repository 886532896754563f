"""How many calls are served at once.

Only what lasts is counted: streams and waits. A cancel, a health check or a look at an operation is
always answered, however many callers wait in the queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hocket.errors import Refused

_RETRY_US = 1_000_000


class CallLimit:
    """Counts the calls that are being served."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.open = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call while the block runs; raises Refused (TOO_MANY_CALLS) at once when it is one too
        many."""
        if self.open >= self._most:
            told = f"{self._most} calls are open, the limit of this gateway"
            raise Refused("TOO_MANY_CALLS", told, _RETRY_US)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
