"""Artifacts copied to this worker beside its steps, because their holder is drained or stops.

Control says which, and says it again until a heartbeat names the copy: what fails here is let go.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from gpuworker.collectives.rendezvous import BlobLost, Rendezvous
from gpuworker.memory.latents import LatentShelf
from gpuworker.state import LatentState, StateCorrupt
from gpuworker.steps.fetching import Ask, fetch_from
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

_AT_ONCE = 2
_WAITING_MAX = 256
_ASK_US = 2_000_000  # the latent is there already
_FETCH_S = 60.0


class Copies:
    """Thread-safe."""

    def __init__(self, worker: str, shelf: LatentShelf, rendezvous: Rendezvous, ask: Ask) -> None:
        self._worker = worker
        self._shelf = shelf
        self._rendezvous = rendezvous
        self._ask = ask
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copy")
        self._lock = threading.Lock()
        # By request and artifact: steps behind it, called off.
        self._wanted: dict[tuple[str, str], tuple[int, threading.Event]] = {}

    def want(self, fetch: mesh_pb2.LatentFetch) -> None:
        """Copies an artifact as soon as a thread is free; what is here, or coming, is not."""
        wanted = (fetch.request_id, fetch.artifact)
        have = self._shelf.steps_done(*wanted)
        if fetch.holder.worker == self._worker or (have is not None and have >= fetch.steps_done):
            return
        with self._lock:
            steps, off = self._wanted.get(wanted, (-1, None))
            if steps >= fetch.steps_done or len(self._wanted) >= _WAITING_MAX:
                return
            if off is not None:
                off.set()
            off = threading.Event()
            self._wanted[wanted] = (fetch.steps_done, off)
        self._threads.submit(self._copy, fetch, off)

    def release(self, request: str) -> None:
        """The request has ended."""
        with self._lock:
            for (wanted, _), (_, off) in self._wanted.items():
                if wanted == request:
                    off.set()

    @property
    def under_way(self) -> int:
        """Copies that are waited for."""
        with self._lock:
            return len(self._wanted)

    def close(self) -> None:
        """Calls all of them off; waits for none."""
        with self._lock:
            for _, off in self._wanted.values():
                off.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _copy(self, fetch: mesh_pb2.LatentFetch, off: threading.Event) -> None:
        asked = mesh_pb2.LatentRequest(
            request_id=fetch.request_id,
            steps_done=fetch.steps_done,
            attempt=fetch.attempt,
            wait_us=_ASK_US,
            artifact=fetch.artifact,
        )
        wanted = (fetch.request_id, fetch.artifact)
        try:
            if not off.is_set():
                blob = fetch_from(self._rendezvous, self._ask, fetch.holder, asked, _FETCH_S, off)
                state = LatentState.from_bytes(blob)
                self._shelf.add(fetch.request_id, state, fetch.artifact)
        except (BlobLost, StateCorrupt) as error:
            log.warning("%s was not copied from %s: %s", asked.request_id, fetch.holder, error)
        except Exception:  # whatever a store or the bus has raised: said again, it is tried again
            log.exception("%s was not copied", asked.request_id)
        finally:
            with self._lock:
                if self._wanted.get(wanted, (0, None))[1] is off:
                    del self._wanted[wanted]
