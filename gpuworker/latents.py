"""The latents a worker holds: one per request, always the newest, never touched until the next step
has ended.

A holder offers a latent on request: the bytes go under a key into this worker's rendezvous store,
from which the asking worker fetches them. Asking may come before the step has ended; then the
answer waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gpuworker.state import LatentState
from hocket.v1 import mesh_pb2, types_pb2

_RELEASED_MAX = 4096


@dataclass
class LatentMissing(Exception):
    """No holder could give the latent that an assignment starts from."""

    request: str
    steps_done: int
    tried: tuple[str, ...]

    def __str__(self) -> str:
        return f"no latent of {self.request} after step {self.steps_done}; tried {self.tried}"


class LatentShelf:
    """Thread-safe: the compute thread puts, the agent's threads offer and drop."""

    def __init__(self, put: Callable[[str, bytes], None], drop: Callable[[str], None]) -> None:
        self._put_bytes = put
        self._drop_bytes = drop
        self._changed = threading.Condition()
        self._states: dict[str, LatentState] = {}
        self._offered: dict[str, set[str]] = {}  # keys in the store, by request
        self._released: dict[str, None] = {}  # a step in hand may end after its request's release

    def put(self, request: str, state: LatentState) -> None:
        with self._changed:
            if request not in self._released:
                self._states[request] = state
            self._changed.notify_all()

    def get(self, request: str, steps_done: int) -> LatentState | None:
        """The request's latent if it has exactly that many steps behind it."""
        with self._changed:
            state = self._states.get(request)
        return state if state is not None and state.steps_done == steps_done else None

    def steps_done(self, request: str) -> int | None:
        """Steps behind the held latent; None where none is held."""
        with self._changed:
            state = self._states.get(request)
        return None if state is None else state.steps_done

    def release(self, request: str) -> None:
        with self._changed:
            self._states.pop(request, None)
            keys = self._offered.pop(request, set())
            self._released[request] = None
            while len(self._released) > _RELEASED_MAX:
                del self._released[next(iter(self._released))]
            self._changed.notify_all()
        for key in keys:
            self._drop_bytes(key)

    def held(self) -> tuple[mesh_pb2.HeldLatent, ...]:
        with self._changed:
            states = tuple(self._states.items())
        return tuple(
            mesh_pb2.HeldLatent(
                request_id=request, steps_done=state.steps_done, size_bytes=state.nbytes
            )
            for request, state in states
        )

    def offer(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        """Blocks up to `asked.wait_us` for the step to end, then puts the bytes into the store."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_reached(asked.request_id, asked.steps_done),
                timeout=asked.wait_us / 1e6,
            )
            state = self._states.get(asked.request_id)
        if state is None or state.steps_done != asked.steps_done:
            have = "none" if state is None else f"one after step {state.steps_done}"
            return mesh_pb2.LatentReply(
                failure=types_pb2.Failure(
                    reason="LATENT_MISSING",
                    message=f"asked for a latent after step {asked.steps_done}, have {have}",
                )
            )
        key = f"latent/{asked.request_id}/{asked.attempt}/{asked.steps_done}"
        blob = state.to_bytes()
        self._put_bytes(key, blob)
        with self._changed:
            kept = asked.request_id in self._states
            if kept:
                self._offered.setdefault(asked.request_id, set()).add(key)
        if not kept:
            self._drop_bytes(key)
        return mesh_pb2.LatentReply(key=key, size_bytes=len(blob))

    def _has_reached(self, request: str, steps_done: int) -> bool:
        state = self._states.get(request)
        return state is not None and state.steps_done >= steps_done
