"""Where workers meet: each hosts a small store, for the groups whose first member it is and for the
blobs it offers to others. Every wait has an end.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

from torch._C._distributed_c10d import TCPStore

from gpuworker.collectives.tunnel import Tunnel
from hocket.clock import SystemClock

_CONNECT_TIMEOUT_S = 30.0
_STORE_TIMEOUT = timedelta(seconds=10)  # of a connect or a get at another worker's store
_CHUNK_BYTES = 4 << 20  # a store value may have 8 MiB
_POLL_S = 0.0005
_CANCEL_POLL_S = 0.02
_CLOCK = SystemClock()
T = TypeVar("T")


class BlobLost(Exception):
    """A blob that could not be fetched. Fields: `address` of its holder, `key`, `cause`."""

    def __init__(self, address: str, key: str, cause: str) -> None:
        super().__init__(f"{key} at {address}: {cause}")
        self.address, self.key, self.cause = address, key, cause


class Cancel(Protocol):
    """Says when to give a wait up; a `threading.Event` is one."""

    def is_set(self) -> bool: ...


class Rendezvous:
    """This process's store: where the groups meet whose first member it is, and which offers blobs.

    `address` ("host:port") goes out with the heartbeat. Lives as long as the process. Thread-safe.
    """

    def __init__(self, host: str = "127.0.0.1", tunnel: Tunnel | None = None) -> None:
        """`host`: where others reach this worker; with a tunnel, only through that."""
        self.host = host
        self._tunnel = tunnel
        listener = socket.create_server(("127.0.0.1" if tunnel is not None else host, 0))
        local = listener.getsockname()
        self._store: Any = TCPStore(
            local[0],
            local[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        port = local[1] if tunnel is None else tunnel.expose(host, local[1])
        self.address = f"{host}:{port}"
        self._clients: dict[str, Any] = {}

    def client(self, address: str) -> Any:
        """A store at `address`, else OSError or RuntimeError; blocks where the host is stopped."""
        if address == self.address:
            return self._store
        if address not in self._clients:
            way = address if self._tunnel is None else self._tunnel.reach(address)
            host, port = way.rsplit(":", 1)
            # TCPStore itself would try for long where nobody listens.
            socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
            self._clients[address] = TCPStore(host, int(port), None, False, _STORE_TIMEOUT, False)
        return self._clients[address]

    def forget(self, address: str) -> None:
        """Connects anew next time."""
        self._clients.pop(address, None)

    def close(self) -> None:
        """Lets the store go; it stops when nothing uses it any more."""
        self._clients, self._store = {}, None
        if self._tunnel is not None:
            self._tunnel.close()

    def put(self, key: str, blob: bytes) -> None:
        """Offers a blob of any size to whoever fetches `key` from here; keeps it until `drop`."""
        chunks = range(0, len(blob), _CHUNK_BYTES)
        for number, start in enumerate(chunks):
            self._store.set(f"blob/{key}/{number}", blob[start : start + _CHUNK_BYTES])
        self._store.set(f"blob/{key}", str(len(chunks)))  # last: all of it is there

    def drop(self, key: str) -> None:
        """Takes an offered blob back; one that is not there is fine."""
        if self._store.check([f"blob/{key}"]):
            chunks = int(self._store.get(f"blob/{key}"))
            for name in (f"blob/{key}", *(f"blob/{key}/{number}" for number in range(chunks))):
                self._store.delete_key(name)
        self._store.delete_key(f"got/{key}")

    def fetched(self, key: str) -> int:
        """How often an offered blob has been fetched, to its last byte."""
        got = f"got/{key}"
        return int(self._store.get(got)) if self._store.check([got]) else 0

    def drop_all(self, prefix: str) -> None:
        """Takes back whatever stands here under keys that begin so."""
        for key in self._store.list_keys():
            if key.startswith(prefix):
                self._store.delete_key(key)

    def fetch(
        self, address: str, key: str, timeout_s: float, cancel: Cancel | None = None
    ) -> bytes:
        """Waits until the worker at `address` offers `key` and returns it. Raises `BlobLost`."""

        def work(abandoned: threading.Event) -> bytes:
            store = self.client(address)
            wait_until(partial(store.check, [f"blob/{key}"]), abandoned)
            chunks = int(store.get(f"blob/{key}"))
            blob = b"".join(store.get(f"blob/{key}/{number}") for number in range(chunks))
            if not abandoned.is_set():
                store.add(f"got/{key}", 1)  # so that the holder can let it go
            return blob

        try:
            return run_bounded(work, timeout_s, cancel)
        except (RuntimeError, OSError, Abandoned) as error:
            self.forget(address)
            raise BlobLost(address, key, str(error)) from error


class Abandoned(Exception):
    """A bounded call that its caller left; the text is "time-out" or "cancelled"."""


def run_bounded(
    work: Callable[[threading.Event], T], timeout_s: float, cancel: Cancel | None = None
) -> T:
    """Runs `work(abandoned)` on a thread of its own; raises what it raises, or `Abandoned`.

    An abandoned thread sees its event set; one that is stuck in a system call ends with that call.
    """
    result: Future[T] = Future()
    abandoned = threading.Event()

    def run() -> None:
        try:
            result.set_result(work(abandoned))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="bounded", daemon=True).start()
    end_us = _CLOCK.now_us() + int(timeout_s * 1e6)
    while not wait([result], _CANCEL_POLL_S).done:
        if (cancelled := cancel is not None and cancel.is_set()) or _CLOCK.now_us() >= end_us:
            abandoned.set()
            raise Abandoned("cancelled" if cancelled else "time-out")
    return result.result()


def wait_until(ready: Callable[[], bool], abandoned: threading.Event) -> None:
    while not ready():
        if abandoned.wait(_POLL_S):
            raise Abandoned("time-out")
