"""Callers that go away before their request has ended, and the cancels that this causes.

A request is cancelled when the last caller that follows it here is gone, unless it is detached. A
gateway that shuts down cancels nothing: its callers come back through another one with the same
idempotency key.
"""

from __future__ import annotations

import logging
from collections import Counter

from gateway.cluster import Cluster
from hocket.errors import HocketError
from hocket.v1.control_pb2 import CancelRequestRequest

log = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 5.0


class Departures:
    """Counts who follows which request."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._followers: Counter[str] = Counter()
        self.shutting_down = False

    def join(self, request_id: str) -> None:
        self._followers[request_id] += 1

    def leave(self, request_id: str) -> bool:
        """One follower less; whether it was the last one."""
        self._followers[request_id] -= 1
        if self._followers[request_id] > 0:
            return False
        del self._followers[request_id]
        return True

    async def cancel(self, request_id: str) -> None:
        """Tells control that nobody waits for the request any more."""
        wanted = CancelRequestRequest(request_id=request_id)
        try:
            answer = await self._cluster.ask(
                lambda control: control.CancelRequest(wanted, wait_for_ready=True),
                _CANCEL_TIMEOUT_S,
            )
        except HocketError as error:
            log.warning("could not cancel %s: %s", request_id, error)
        else:
            ended = "cancelled" if answer.was_running else "had ended"
            log.info("caller of %s went away; the request %s", request_id, ended)
