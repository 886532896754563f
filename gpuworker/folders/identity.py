"""What makes two components the same weights, whichever models they came with.

A *part* is named by a digest over the class, the configuration, the precision and the bytes of the
weights' files. The hub's cache calls a file by its SHA-256 already; any other file is hashed once a
host: a memo keeps the digest by path, size and time of change. Names of files and what libraries
write into a configuration about themselves make no difference.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_PART_DIGITS = 32  # hex
_BLOB = re.compile(r"[0-9a-f]{64}")
_ABOUT_ITSELF = frozenset(("transformers_version", "torch_dtype", "dtype", "architectures"))

_Memo = dict[str, tuple[int, int, str]]  # path -> size, time of change in ns, digest


class FileDigests:
    """SHA-256 of files, in hex. Processes of one host may share a memo."""

    def __init__(self, memo: Path | None = None) -> None:
        """`memo` is written; None: digests are kept for this process."""
        self._memo = memo
        self._known: _Memo = {}
        self.hashed_bytes = 0

    def of(self, file: Path) -> str:
        """Of the file's content."""
        real = file.resolve()
        if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
            return real.name
        facts = real.stat()
        key, stamp = str(real), (facts.st_size, facts.st_mtime_ns)
        if self._has(key, stamp):
            return self._known[key][2]
        with self._locked():  # the others of a pool wait for the one that hashes
            if not self._has(key, stamp):
                self._known |= self._read()
            if not self._has(key, stamp):
                with real.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                self.hashed_bytes += facts.st_size
                self._known[key] = (*stamp, digest)
                self._write()
        return self._known[key][2]

    def _has(self, key: str, stamp: tuple[int, int]) -> bool:
        return key in self._known and self._known[key][:2] == stamp

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._memo is None:
            yield
            return
        self._memo.parent.mkdir(parents=True, exist_ok=True)
        with self._memo.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> _Memo:
        if self._memo is None or not self._memo.exists():
            return {}
        try:
            content = json.loads(self._memo.read_text(encoding="utf-8"))
            return {str(key): (int(s), int(t), str(d)) for key, (s, t, d) in content.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s is no memo of digests: %s", self._memo, error)
            return {}

    def _write(self) -> None:
        if self._memo is None:
            return
        fresh = self._memo.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(self._known), encoding="utf-8")
        fresh.replace(self._memo)


def part_id(kind: str, config: Mapping[str, Any], precision: str, digests: Sequence[str]) -> str:
    """The part that a component is: its class, its config.json, the type that it is loaded as, the
    digests of its weights' files.
    """
    own = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in _ABOUT_ITSELF
    }
    told = json.dumps([kind, own, precision, sorted(digests)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:_PART_DIGITS]
