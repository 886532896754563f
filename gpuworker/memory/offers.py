"""Copies of artifacts in this worker's store, for whoever has asked for them.

One of each: a copy goes when all who asked have fetched it, when another version of the artifact is
offered, when the request ends, or after two minutes. What lies here counts in the latents' share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from hocket.clock import SystemClock

_KEPT_US = 120_000_000  # for somebody who has asked and does not come
_CLOCK = SystemClock()
Key = tuple[str, str]  # request, artifact


@dataclass
class _Offer:
    key: str
    size_bytes: int
    asked: int  # how many have
    until_us: int


class Offers:
    """Thread-safe. Lending and tidying exclude each other; withdrawing waits for neither."""

    def __init__(
        self,
        put: Callable[[str, bytes], None],
        drop: Callable[[str], None],
        fetched: Callable[[str], int],
    ) -> None:
        self._put = put
        self._drop = drop
        self._fetched = fetched
        self._lending = threading.Lock()
        self._lock = threading.Lock()
        self._offers: dict[Key, _Offer] = {}

    def lend(self, artifact: Key, key: str, blob: bytes) -> None:
        """Puts a copy into the store under a key that says which version it is."""
        until_us = _CLOCK.now_us() + _KEPT_US
        with self._lending:
            self._tidy()
            with self._lock:
                known = self._offers.get(artifact)
                if known is not None and known.key == key:
                    known.asked, known.until_us = known.asked + 1, until_us
                    return
                offer = self._offers[artifact] = _Offer(key, len(blob), 1, until_us)
            if known is not None:
                self._drop(known.key)
            self._put(key, blob)
            with self._lock:
                withdrawn = self._offers.get(artifact) is not offer
            if withdrawn:
                self._drop(key)

    def withdraw(self, request: str) -> None:
        """The request has ended."""
        with self._lock:
            found = [artifact for artifact in self._offers if artifact[0] == request]
            offers = [self._offers.pop(artifact) for artifact in found]
        for offer in offers:
            self._drop(offer.key)

    def tidy(self) -> None:
        """Drops what all who asked have fetched by now, and what nobody fetches."""
        with self._lending:
            self._tidy()

    @property
    def size_bytes(self) -> int:
        """Of all copies."""
        with self._lock:
            return sum(offer.size_bytes for offer in self._offers.values())

    def _tidy(self) -> None:
        with self._lock:
            offers = list(self._offers.items())
        now_us = _CLOCK.now_us()
        for artifact, offer in offers:
            if offer.until_us > now_us and self._fetched(offer.key) < offer.asked:
                continue
            with self._lock:
                gone = self._offers.get(artifact) is offer and self._offers.pop(artifact)
            if gone:
                self._drop(offer.key)
