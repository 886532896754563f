"""Events of a request, as control tells them, in the words of the public API."""

from __future__ import annotations

from hocket.errors import RequestFailed
from hocket.v1.generation_pb2 import (
    CancelledGeneration,
    GenerateResponse,
    Progress,
    WatchGenerationResponse,
)
from hocket.v1.mesh_pb2 import RequestEvent

ACCEPTED_CURSOR = 1  # sequence of every request's first event


def told_by_generate(event: RequestEvent, progress_every: int) -> GenerateResponse | None:
    """What Generate says of an event but `finished`; raises RequestFailed at a bad end."""
    match event.WhichOneof("event"):
        case "progress" if _is_due(event.progress, progress_every):
            return GenerateResponse(progress=event.progress, cursor=str(event.sequence))
        case "degraded":
            return GenerateResponse(degraded=event.degraded, cursor=str(event.sequence))
        case "failed":
            failed = event.failed
            raise RequestFailed(failed.reason, failed.message, dict(failed.metadata))
        case "cancelled":
            raise RequestFailed("CANCELLED", was_cancelled(event.cancelled.steps_done))
        case _:
            return None  # `accepted`, which the answer told


def told_by_watch(event: RequestEvent) -> WatchGenerationResponse:
    """What WatchGeneration says of an event."""
    told = WatchGenerationResponse(cursor=str(event.sequence))
    match event.WhichOneof("event"):
        case "accepted":
            told.accepted.CopyFrom(event.accepted)
        case "progress":
            told.progress.CopyFrom(event.progress)
        case "degraded":
            told.degraded.CopyFrom(event.degraded)
        case "finished":
            told.finished.CopyFrom(event.finished)
        case "failed":
            told.failed.CopyFrom(event.failed)
        case "cancelled":
            told.cancelled.CopyFrom(CancelledGeneration(steps_done=event.cancelled.steps_done))
    return told


def was_cancelled(steps_done: int) -> str:
    """A cancelled request's end, in words."""
    return f"the request was cancelled after {steps_done} steps"


def _is_due(progress: Progress, every: int) -> bool:
    return progress.step % every == 0 or progress.step == progress.steps
