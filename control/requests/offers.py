"""What waits at the door of admission, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from control.requests.records import Record
from control.scheduler.values import Request
from hocket.v1 import control_pb2, journal_pb2

Answered = Callable[[control_pb2.SubmitResponse, bool], None]  # the answer; is it an earlier one's


@dataclass(frozen=True)
class AdmissionSettings:
    """What bounds admission."""

    open_max: int = 10_000  # requests promised and not ended
    waiting_max: int = 4_096  # of them, those that wait for their forecast
    settle_us: int = 0  # so long after its start control waits for its first worker
    best_effort_wait_us_max: int = 0  # as the policy bounds it; 0: it does not


@dataclass
class Offer:
    """A request that holds a place and waits for its answer."""

    record: Record
    wanted: list[Callable[[], bool]]
    answered: list[Answered]
    expires_us: list[int | None]
    traceparent: str
    began_ns: int
    is_cancelled: bool = False

    def is_wanted(self, now_us: int) -> bool:
        """Whether any of its callers still waits."""
        return not self.is_cancelled and any(
            wanted() and (expires_us is None or now_us < expires_us)
            for wanted, expires_us in zip(self.wanted, self.expires_us, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Decided:
    """What is to be promised."""

    offer: Offer
    promise: journal_pb2.Promise
    request: Request  # as the scheduler will see it
    accepted_us: int
    finish_us: int  # as its caller is told
    on_time: bool
