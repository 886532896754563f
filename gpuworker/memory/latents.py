"""The artifacts a worker holds: latents, and of workflows embeddings and pixels, too. Always the
newest one of its name for each request, never touched until the next step has ended.

An artifact of a workflow has a name, "node.port"; the latents of a plain chain have the empty one.

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
Key = tuple[str, str]  # request, artifact


@dataclass
class LatentMissing(Exception):
    """No holder could give the latent that an assignment starts from."""

    request: str
    steps_done: int
    tried: tuple[str, ...]
    agreed: bool = True  # every member of the group knows it
    artifact: str = ""

    def __str__(self) -> str:
        what = self.artifact or "latent"
        return f"no {what} of {self.request} after step {self.steps_done}; tried {self.tried}"


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
    prompts_bytes: int = 0  # of the device's, for embeddings of prompts asked for before


class LatentPlace(Enum):
    """Where a latent is."""

    DEVICE = "device"
    HOST = "host"
    FILE = "file"


@dataclass(eq=False)
class _Entry:
    """One request's artifact; a spilled one is another entry."""

    steps_done: int
    size_bytes: int
    device: torch.device  # where it belongs
    place: LatentPlace
    state: LatentState | None = None  # on the device or the host
    file: Path | None = None

    @classmethod
    def of(cls, state: LatentState, host: LatentPlace) -> _Entry:
        """`host`: whose share host memory is."""
        device = next(iter(state.tensors.values())).device
        place = host if device.type == "cpu" else LatentPlace.DEVICE
        return cls(state.steps_done, state.nbytes, device, place, state)


class LatentShelf:
    """Thread-safe: the compute thread puts and gets, the agent's threads offer and drop."""

    def __init__(
        self,
        put: Callable[[str, bytes], None],
        drop: Callable[[str], None],
        shares: Shares | None = None,
        fetched: Callable[[str], int] = lambda key: 0,
        beside: Callable[[], int] = lambda: 0,
        arriving: Callable[[], int] = lambda: 0,
    ) -> None:
        """`put` and `drop` offer bytes under a key; `fetched` tells how often they were fetched.

        Bytes of others that count in the share of latents: `beside` them on the device, and
        `arriving` on the host.
        """
        self._beside, self._arriving = beside, arriving
        self._offers = Offers(put, drop, fetched)
        self._shares = shares or Shares()
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # who waits for a step
        self._over = threading.Condition(lock)  # the spilling thread: woken only for work
        self._entries: dict[Key, _Entry] = {}  # least recently used first
        self._released: dict[str, None] = {}  # a step in hand may end after its request's release
        self._in_hand: frozenset[str] = frozenset()
        self._stuck: set[Key] = set()  # could not be spilled
        self._pressed = False  # memory ran out: all that is parked goes
        self._files = itertools.count()
        self._closed = False
        self._thread: threading.Thread | None = None
        if self._shares.folder is not None:
            shutil.rmtree(self._shares.folder, ignore_errors=True)
            self._shares.folder.mkdir(parents=True)
            self._thread = threading.Thread(target=self._spill_all, name="spill", daemon=True)
            self._thread.start()

    def put(self, request: str, state: LatentState, artifact: str = "") -> None:
        with self._changed:
            if request not in self._released:
                self._replace((request, artifact), self._entry(state))
            self._tell()

    def add(self, request: str, state: LatentState, artifact: str = "") -> bool:
        """Keeps a copy from elsewhere, unless the request has ended or a newer one is here."""
        with self._changed:
            entry = self._entries.get((request, artifact))
            behind = entry is not None and entry.steps_done >= state.steps_done
            if behind or request in self._released:
                return False
            self._replace((request, artifact), self._entry(state))
            self._tell()
        return True

    def get(self, request: str, steps_done: int, artifact: str = "") -> LatentState | None:
        """The request's artifact if it has exactly that many steps behind it; a spilled one comes
        back.
        """
        key = (request, artifact)
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or entry.steps_done != steps_done:
                return None
            self._entries[key] = self._entries.pop(key)
        if entry.state is not None and entry.place is self._place_of(entry.device):
            return entry.state
        state = _read(entry)
        with self._changed:
            if self._entries.get(key) is entry:  # what cannot be read is held no more
                self._replace(key, None if state is None else self._entry(state))
                self._tell()
        return state

    def has(self, asked: mesh_pb2.LatentRequest) -> bool:
        """Whether an offer of it need not wait."""
        with self._changed:
            return self._has_reached((asked.request_id, asked.artifact), asked.steps_done)

    def steps_done(self, request: str, artifact: str = "") -> int | None:
        """Steps behind the held artifact; None where none is held."""
        with self._changed:
            entry = self._entries.get((request, artifact))
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
        """Drops all of the request's artifacts, and what comes of it later."""
        with self._changed:
            for key in [key for key in self._entries if key[0] == request]:
                self._replace(key, None)
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
                spilled=entry.place is not self._place_of(entry.device),
                artifact=artifact,
            )
            for (request, artifact), entry in entries
        )

    def bytes_in(self, place: LatentPlace) -> int:
        """Of all latents there."""
        with self._changed:
            return self._bytes_in(place)

    def offer(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        """Blocks up to `asked.wait_us` for the step to end, then puts the bytes into the store."""
        wanted = (asked.request_id, asked.artifact)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._has_reached(wanted, asked.steps_done),
                timeout=asked.wait_us / 1e6,
            )
            entry = self._entries.get(wanted)
        blob = None
        if entry is not None and entry.steps_done == asked.steps_done:
            blob = self._blob(wanted, entry)
        if blob is None:
            have = "none" if entry is None else f"one after step {entry.steps_done}"
            failure = types_pb2.Failure(
                reason="LATENT_MISSING",
                message=f"asked for {asked.artifact or 'a latent'} after step {asked.steps_done}, "
                f"have {have}",
            )
            return mesh_pb2.LatentReply(failure=failure)
        name = "/".join(part for part in wanted if part)
        key = f"latent/{name}/{asked.attempt}/{asked.steps_done}"
        self._offers.lend(wanted, key, blob)
        with self._changed:
            kept = wanted in self._entries
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

    def _entry(self, state: LatentState) -> _Entry:
        return _Entry.of(state, self._host_place())

    def _place_of(self, device: torch.device) -> LatentPlace:
        """Where something of that device is before it is spilled."""
        return self._host_place() if device.type == "cpu" else LatentPlace.DEVICE

    def _has_reached(self, key: Key, steps_done: int) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.steps_done >= steps_done

    def _blob(self, key: Key, entry: _Entry | None) -> bytes | None:
        """The artifact's bytes, wherever it is; None where it is gone."""
        while entry is not None:
            if entry.state is not None:
                return entry.state.to_bytes()
            assert entry.file is not None
            try:
                return entry.file.read_bytes()
            except OSError:
                before = entry
                with self._changed:  # it has come back meanwhile, gone on, or was released
                    entry = self._entries.get(key)
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
            key, entry, place = found
            try:
                spilled = self._spilled(entry, place)
            except (OSError, RuntimeError, MemoryError) as error:
                log.warning("%s of %s stays where it is: %s", key[1] or "latent", key[0], error)
                with self._changed:
                    self._stuck.add(key)
                continue
            with self._changed:
                if self._entries.get(key) is entry and key[0] not in self._in_hand:
                    self._replace(key, spilled, newest=False)
                elif spilled.file is not None:  # it was used, or released, meanwhile
                    spilled.file.unlink(missing_ok=True)
                self._tell()

    def _next(self) -> tuple[Key, _Entry, LatentPlace] | None:
        """What has to be spilled now, and where to."""
        device_bytes = 0 if self._pressed else self._shares.device_bytes or sys.maxsize
        for place, share_bytes in (
            (LatentPlace.HOST, self._shares.host_bytes),
            (LatentPlace.DEVICE, device_bytes),
        ):
            on_host = place is self._host_place()
            lent = self.offered_bytes + self._arriving() if on_host else 0
            beside = self._beside() if place is LatentPlace.DEVICE else 0
            if self._bytes_in(place) + lent + beside <= share_bytes:
                continue
            for key, entry in self._entries.items():
                parked = key[0] not in self._in_hand and key not in self._stuck
                if parked and entry.place is place:
                    return key, entry, self._below(entry)
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

    def _replace(self, key: Key, entry: _Entry | None, *, newest: bool = True) -> None:
        """The lock is held by the caller; a file that nobody needs any more goes."""
        before = self._entries.get(key)
        if before is not None and before.file is not None:
            before.file.unlink(missing_ok=True)
        self._stuck.discard(key)
        if entry is None or newest:
            self._entries.pop(key, None)
        if entry is not None:
            self._entries[key] = entry

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
