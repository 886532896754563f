"""Files that requests brought, from the cluster's bucket for inputs to this worker.

Fetching begins when an assignment comes, beside the steps in hand, so that the file is here by the
time of its call. A file is read piece by piece with JetStream's gets, without a consumer (ADR 21),
checked against its digest, and kept while there is room, since a repeated call takes it again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillWaiting
from contextlib import suppress

import nats.errors
from nats.js.api import RawStreamMsg
from nats.js.errors import Error as JetStreamError
from nats.js.errors import NotFoundError

from gpuworker.memory.latents import CalledOff
from gpuworker.steps.files import InputAway, InputMissing, names_of
from hocket.clock import steady_ns
from hocket.messaging.bus import Bus
from hocket.v1 import mesh_pb2

FILE_BYTES_MAX = 256 << 20
_KEPT_BYTES_MAX = 256 << 20  # of all files; the last one may be more
_AT_ONCE = 4
_POLL_S = 0.02  # whether it was called off
_TRIES, _AGAIN_S = 10, 0.2  # while the broker is away
_DIGEST = re.compile(r"[0-9a-f]{64}")


class _Unreadable(Exception):
    """A file that is not in the store, or not what it should be."""


class _Unanswered(Exception):
    """The store did not give an answer."""


class InputReader:
    """One worker's way to the bucket. Make it on the loop; thread-safe from then on."""

    def __init__(self, bus: Bus, bucket: str) -> None:
        self._bus = bus
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"
        self._loop = asyncio.get_running_loop()
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, Future[bytes]] = OrderedDict()  # last used last

    def want(self, assignment: mesh_pb2.Assignment) -> None:
        for member in assignment.batch:
            for _, name in names_of(member):
                self._file(name)

    def take(self, request: str, name: str, timeout_s: float, off: threading.Event) -> bytes:
        end_ns, file = steady_ns() + int(timeout_s * 1e9), self._file(name)
        while True:
            try:
                return file.result(_POLL_S)
            except StillWaiting:
                if off.is_set():
                    raise CalledOff(request) from None
                if steady_ns() >= end_ns:
                    told = f"not here after {timeout_s:g} s"
                    raise InputAway(request, name, told) from None
            except _Unreadable as error:
                raise InputMissing(request, name, str(error)) from error
            except _Unanswered as error:
                raise InputAway(request, name, str(error)) from error

    @property
    def size_bytes(self) -> int:
        """Of the files that are kept."""
        with self._lock:
            return sum(len(f.result()) for f in self._files.values() if _is_here(f))

    def close(self) -> None:
        """Gives up what is under way. To be called on the loop."""
        for task in self._tasks:
            task.cancel()

    def _file(self, name: str) -> Future[bytes]:
        """A file that is here, or under way from now on."""
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = Future()
                self._loop.call_soon_threadsafe(self._start, name, file)
            self._files.move_to_end(name)
        return file

    def _start(self, name: str, file: Future[bytes]) -> None:
        task = self._loop.create_task(self._fetch(name, file))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, name: str, file: Future[bytes]) -> None:
        try:
            async with self._at_once:
                content = await self._read_again(name)
        except asyncio.CancelledError:
            file.set_exception(_Unanswered("the worker stops"))
            raise
        except Exception as error:  # told to whoever takes it; said again, it is tried again
            with self._lock:
                self._files.pop(name, None)
            told = error if isinstance(error, _Unreadable) else _Unanswered(repr(error))
            file.set_exception(told)
        else:
            file.set_result(content)
            self._drop_oldest()

    async def _read_again(self, name: str) -> bytes:
        """Reads a file, again and again while the broker does not answer."""
        for _ in range(_TRIES - 1):
            with suppress(nats.errors.Error, OSError, TimeoutError):
                return await self._read(name)
            await asyncio.sleep(_AGAIN_S)
        return await self._read(name)

    async def _read(self, name: str) -> bytes:
        encoded = base64.urlsafe_b64encode(name.encode()).decode()
        message = await self._get(f"$O.{self._bucket}.M.{encoded}", None)
        try:
            facts = json.loads(message.data or b"{}")
            size = int(facts.get("size", 0))
        except (ValueError, TypeError, AttributeError) as error:
            raise _Unreadable("its description in the store of inputs is broken") from error
        if facts.get("deleted") or not facts.get("nuid"):
            raise _Unreadable("not in the store of inputs")
        if size > FILE_BYTES_MAX:
            raise _Unreadable(f"{size} bytes; at most {FILE_BYTES_MAX} are taken")
        content, sequence = bytearray(), 1
        while len(content) < size:
            piece = await self._get(f"$O.{self._bucket}.C.{facts['nuid']}", sequence)
            content += piece.data or b""
            sequence = (piece.seq or 0) + 1
        whole = bytes(content)
        await asyncio.to_thread(_check, whole, name, str(facts.get("digest", "")))
        return whole

    async def _get(self, subject: str, sequence: int | None) -> RawStreamMsg:
        """The newest message on a subject, or the first one from a sequence on: from any copy of
        the stream, else from the one that leads.
        """
        for direct in (True, False):
            try:
                return await self._bus.jetstream.get_msg(
                    self._stream,
                    seq=sequence,
                    subject=subject,
                    direct=direct,
                    next=sequence is not None,
                )
            except NotFoundError:
                continue
            except JetStreamError:
                if not direct:
                    raise
        raise _Unreadable("not in the store of inputs")

    def _drop_oldest(self) -> None:
        with self._lock:
            here = [(name, file) for name, file in self._files.items() if _is_here(file)]
            kept = sum(len(file.result()) for _, file in here)
            for name, file in here[:-1]:
                if kept <= _KEPT_BYTES_MAX:
                    return
                kept -= len(file.result())
                del self._files[name]


def _is_here(file: Future[bytes]) -> bool:
    return file.done() and file.exception() is None


def _check(content: bytes, name: str, said: str) -> None:
    """Raises `_Unreadable` where the content is not what its description, or its name, says."""
    digest = hashlib.sha256(content)
    described = "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode()
    named = _DIGEST.findall(name)
    if said.rstrip("=") != described.rstrip("=") or (named and named[-1] != digest.hexdigest()):
        raise _Unreadable("its content is not what its digest says")
