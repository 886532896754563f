"""Embeddings of prompts that were asked for before, by content and within a bound of bytes.

A text that is asked twice is encoded once: the encoder makes the same of the same text, to the bit,
so what it made is kept. Models whose text encoders, tokenizers and settings are the same share
entries (`texts_id`). Entries are where the encoder made them, and leave least recently used first.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

Embeddings = Mapping[str, Tensor]


class PromptCache:
    """Thread-safe: the compute thread recalls, heartbeats count."""

    def __init__(self, bytes_max: int) -> None:
        """`bytes_max` 0: keeps nothing."""
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._entries: dict[Hashable, tuple[Embeddings, int]] = {}  # least recently used first
        self._size_bytes = 0
        self.recalled = 0  # texts that were here
        self.encoded = 0  # texts that had to be made

    def recall(self, key: Hashable, encode: Callable[[], Embeddings]) -> Embeddings:
        """What is kept under a key, or else what `encode` makes now. Nobody may change it.

        Raises whatever `encode` raises.
        """
        with self._lock:
            found = self._entries.pop(key, None)
            if found is not None:
                self._entries[key] = found
                self.recalled += 1
                return found[0]
        made = encode()
        size_bytes = sum(tensor.untyped_storage().nbytes() for tensor in made.values())
        with self._lock:
            self.encoded += 1
            if size_bytes <= self._bytes_max and key not in self._entries:
                self._entries[key] = (made, size_bytes)
                self._size_bytes += size_bytes
                while self._size_bytes > self._bytes_max:
                    _, freed_bytes = self._entries.pop(next(iter(self._entries)))
                    self._size_bytes -= freed_bytes
        return made

    @property
    def size_bytes(self) -> int:
        """Of all that is kept."""
        with self._lock:
            return self._size_bytes

    def clear(self) -> None:
        """Makes all the room there is: after an allocation failed."""
        with self._lock:
            self._entries.clear()
            self._size_bytes = 0


def texts_id(kind: str, settings: Mapping[str, Any]) -> str:
    """Names what makes embeddings: the family, and all that it may look at beside a text."""
    told = json.dumps([kind, settings], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()
