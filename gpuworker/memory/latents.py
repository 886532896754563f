"""The latents a worker holds: one per request, always the newest, never touched until the next step
has ended.

A holder offers a latent on request: the bytes go under a key into this worker's rendezvous store,
from which the asking worker fetches them. Asking may come before the step has ended; then the
answer waits for it. What is offered counts in the latents' share, and goes as soon as whoever asked
has it, when another latent of the request is offered, or after two minutes.

Parked latents beyond the device's share are spilled, least recently used first, by a thread of its
own: into host memory where the device has a memory of its own, from there, or else at once, into
files. They come back when asked for, to the bit. What the assignment in hand starts from stays.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch

from gpuworker.memory.offers import Offers
from gpuworker.state import LatentState, StateCorrupt
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

_RELEASED_MAX = 4096


@dataclass
class LatentMissing(Exception):
    """No holder could give the latent that an assignment starts from."""

    request: str
    steps_done: int
    tried: tuple[str, ...]
    agreed: bool = True  # every member of the group knows it

    def __str__(self) -> str:
        return f"no latent of {self.request} after step {self.steps_done}; tried {self.tried}"


class CalledOff(Exception):
    """A job was truncated while its latent was looked for. Fields: `request`."""

    def __init__(self, request: str) -> None:
        super().__init__(f"{request} was called off")
        self.request = request


class Shares(NamedTuple):
    """Where parked latents may be. Without a folder nothing is spilled."""

    device_bytes: int = 0  # 0: unlimited
    host_bytes: int = 0  # of a device with a memory of its own
    folder: Path | None = None  # made anew at start, and emptied


class LatentPlace(Enum):
    """Where a latent is."""

    DEVICE = "device"
    HOST = "host"
    FILE = "file"


@dataclass(eq=False)
class _Entry:
    """One request's latent; a spilled one is another entry."""

    steps_done: int
    size_bytes: int
    device: torch.device  # where it belongs
    place: LatentPlace
    state: LatentState | None = None  # on the device or the host
    file: Path | None = None

    @classmethod
    def of(cls, state: LatentState) -> _Entry:
        device = state.tensors["latents"].device
        return cls(state.steps_done, state.nbytes, device, LatentPlace.DEVICE, state)


class LatentShelf:
    """Thread-safe: the compute thread puts and gets, the agent's threads offer and drop."""

    def __init__(
        self,
        put: Callable[[str, bytes], None],
        drop: Callable[[str], None],
        shares: Shares | None = None,
        fetched: Callable[[str], int] = lambda key: 0,
    ) -> None:
        """`put` and `drop` offer bytes under a key; `fetched` tells how often they were fetched."""
        self._offers = Offers(put, drop, fetched)
        self._shares = shares or Shares()
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # who waits for a step
        self._over = threading.Condition(lock)  # the spilling thread: woken only for work
        self._entries: dict[str, _Entry] = {}  # least recently used first
        self._released: dict[str, None] = {}  # a step in hand may end after its request's release
        self._in_hand: frozenset[str] = frozenset()
        self._stuck: set[str] = set()  # could not be spilled
        self._pressed = False  # memory ran out: all that is parked goes
        self._files = itertools.count()
        self._closed = False
        self._thread: threading.Thread | None = None
        if self._shares.folder is not None:
            shutil.rmtree(self._shares.folder, ignore_errors=True)
            self._shares.folder.mkdir(parents=True)
            self._thread = threading.Thread(target=self._spill_all, name="spill", daemon=True)
            self._thread.start()

    def put(self, request: str, state: LatentState) -> None:
        with self._changed:
            if request not in self._released:
                self._replace(request, _Entry.of(state))
            self._tell()

    def add(self, request: str, state: LatentState) -> bool:
        """Keeps a copy from elsewhere, unless the request has ended or a newer one is here."""
        with self._changed:
            entry = self._entries.get(request)
            behind = entry is not None and entry.steps_done >= state.steps_done
            if behind or request in self._released:
                return False
            self._replace(request, _Entry.of(state))
            self._tell()
        return True

    def get(self, request: str, steps_done: int) -> LatentState | None:
        """The request's latent if it has exactly that many steps behind it; a spilled one comes
        back.
        """
        with self._changed:
            entry = self._entries.get(request)
            if entry is None or entry.steps_done != steps_done:
                return None
            self._entries[request] = self._entries.pop(request)
        if entry.place is LatentPlace.DEVICE:
            return entry.state
        state = _read(entry)
        with self._changed:
            if self._entries.get(request) is entry:  # what cannot be read is held no more
                self._replace(request, None if state is None else _Entry.of(state))
                self._tell()
        return state

    def steps_done(self, request: str) -> int | None:
        """Steps behind the held latent; None where none is held."""
        with self._changed:
            entry = self._entries.get(request)
        return None if entry is None else entry.steps_done

    @contextmanager
    def in_hand(self, requests: Collection[str]) -> Iterator[None]:
        """Keeps what an assignment works on from being spilled."""
        with self._changed:
            self._in_hand = frozenset(requests)
        try:
            yield
        finally:
            with self._changed:
                self._in_hand = frozenset()
                self._tell()

    def spill_parked(self) -> None:
        """Makes all the room there is, soon: after an allocation failed."""
        with self._changed:
            self._pressed = True
            self._tell()

    def release(self, request: str) -> None:
        with self._changed:
            self._replace(request, None)
            self._released[request] = None
            while len(self._released) > _RELEASED_MAX:
                del self._released[next(iter(self._released))]
            self._tell()
        self._offers.withdraw(request)

    def held(self) -> tuple[mesh_pb2.HeldLatent, ...]:
        with self._changed:
            entries = tuple(self._entries.items())
        return tuple(
            mesh_pb2.HeldLatent(
                request_id=request,
                steps_done=entry.steps_done,
                size_bytes=entry.size_bytes,
                spilled=entry.place is not LatentPlace.DEVICE,
            )
            for request, entry in entries
        )

    def bytes_in(self, place: LatentPlace) -> int:
        """Of all latents there."""
        with self._changed:
            return self._bytes_in(place)

    def offer(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        """Blocks up to `asked.wait_us` for the step to end, then puts the bytes into the store."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._has_reached(asked.request_id, asked.steps_done),
                timeout=asked.wait_us / 1e6,
            )
            entry = self._entries.get(asked.request_id)
        blob = None
        if entry is not None and entry.steps_done == asked.steps_done:
            blob = self._blob(asked.request_id, entry)
        if blob is None:
            have = "none" if entry is None else f"one after step {entry.steps_done}"
            failure = types_pb2.Failure(
                reason="LATENT_MISSING",
                message=f"asked for a latent after step {asked.steps_done}, have {have}",
            )
            return mesh_pb2.LatentReply(failure=failure)
        key = f"latent/{asked.request_id}/{asked.attempt}/{asked.steps_done}"
        self._offers.lend(asked.request_id, key, blob)
        with self._changed:
            kept = asked.request_id in self._entries
            self._tell()
        if not kept:
            self._offers.withdraw(asked.request_id)
        return mesh_pb2.LatentReply(key=key, size_bytes=len(blob))

    def tidy(self) -> None:
        """Drops what was offered and has been fetched."""
        self._offers.tidy()

    @property
    def offered_bytes(self) -> int:
        """Of the copies that wait to be fetched."""
        return self._offers.size_bytes

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._tell()
        if self._thread is not None:
            self._thread.join()
            assert self._shares.folder is not None
            shutil.rmtree(self._shares.folder, ignore_errors=True)

    def _tell(self) -> None:
        """The lock is held by the caller. Waking a thread for nothing would cost each step."""
        self._changed.notify_all()
        if self._thread is not None and (self._closed or self._next() is not None):
            self._over.notify_all()

    def _has_reached(self, request: str, steps_done: int) -> bool:
        entry = self._entries.get(request)
        return entry is not None and entry.steps_done >= steps_done

    def _blob(self, request: str, entry: _Entry | None) -> bytes | None:
        """The latent's bytes, wherever it is; None where it is gone."""
        while entry is not None:
            if entry.state is not None:
                return entry.state.to_bytes()
            assert entry.file is not None
            try:
                return entry.file.read_bytes()
            except OSError:
                before = entry
                with self._changed:  # it has come back meanwhile, gone on, or was released
                    entry = self._entries.get(request)
                if entry is before or (entry and entry.steps_done != before.steps_done):
                    return None
        return None

    # ------------------------------------------------------------------------------------------
    # spilling

    def _spill_all(self) -> None:
        while True:
            with self._changed:
                self._over.wait_for(lambda: self._closed or self._next() is not None)
                found = None if self._closed else self._next()
            if found is None:
                return
            request, entry, place = found
            try:
                spilled = self._spilled(entry, place)
            except (OSError, RuntimeError, MemoryError) as error:
                log.warning("the latent of %s stays where it is: %s", request, error)
                with self._changed:
                    self._stuck.add(request)
                continue
            with self._changed:
                if self._entries.get(request) is entry and request not in self._in_hand:
                    self._replace(request, spilled, newest=False)
                elif spilled.file is not None:  # it was used, or released, meanwhile
                    spilled.file.unlink(missing_ok=True)
                self._tell()

    def _next(self) -> tuple[str, _Entry, LatentPlace] | None:
        """What has to be spilled now, and where to."""
        device_bytes = 0 if self._pressed else self._shares.device_bytes or sys.maxsize
        for place, share_bytes in (
            (LatentPlace.HOST, self._shares.host_bytes),
            (LatentPlace.DEVICE, device_bytes),
        ):
            lent = self.offered_bytes if place is self._host_place() else 0
            if self._bytes_in(place) + lent <= share_bytes:
                continue
            for request, entry in self._entries.items():
                parked = request not in self._in_hand and request not in self._stuck
                if parked and entry.place is place:
                    return request, entry, self._below(entry)
        self._pressed = False
        return None

    def _host_place(self) -> LatentPlace:
        """Whose share host memory is: of a CPU, the device's."""
        return LatentPlace.HOST if self._shares.host_bytes else LatentPlace.DEVICE

    def _below(self, entry: _Entry) -> LatentPlace:
        own_memory = entry.place is LatentPlace.DEVICE and entry.device.type != "cpu"
        return LatentPlace.HOST if own_memory and self._shares.host_bytes else LatentPlace.FILE

    def _spilled(self, entry: _Entry, place: LatentPlace) -> _Entry:
        assert entry.state is not None and self._shares.folder is not None
        facts = (entry.steps_done, entry.size_bytes, entry.device, place)
        if place is LatentPlace.HOST:
            return _Entry(*facts, state=entry.state.to("cpu"))
        file = self._shares.folder / f"{next(self._files)}.safetensors"
        file.write_bytes(entry.state.to_bytes())
        return _Entry(*facts, file=file)

    def _replace(self, request: str, entry: _Entry | None, *, newest: bool = True) -> None:
        """The lock is held by the caller; a file that nobody needs any more goes."""
        before = self._entries.get(request)
        if before is not None and before.file is not None:
            before.file.unlink(missing_ok=True)
        self._stuck.discard(request)
        if entry is None or newest:
            self._entries.pop(request, None)
        if entry is not None:
            self._entries[request] = entry

    def _bytes_in(self, place: LatentPlace) -> int:
        return sum(e.size_bytes for e in self._entries.values() if e.place is place)


def _read(entry: _Entry) -> LatentState | None:
    """A spilled latent, where it belongs; None where it cannot be read."""
    if entry.state is not None:
        return entry.state.to(entry.device)
    assert entry.file is not None
    try:
        return LatentState.from_bytes(entry.file.read_bytes(), entry.device)
    except (OSError, StateCorrupt) as error:
        log.warning("a spilled latent cannot be read: %s", error)
        return None
