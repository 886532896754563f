"""What comes in is checked before anything is made of it."""

from __future__ import annotations

import math

from hocket.errors import Violation
from hocket.v1 import control_pb2, mesh_pb2

_NAME_MAX = 63
_TERMS_AHEAD_MAX = 1 << 32


def check_heartbeat(beat: mesh_pb2.Heartbeat, term: int) -> str | None:
    """Why the heartbeat is not taken; None: it is."""
    if not beat.worker or len(beat.worker) > _NAME_MAX:
        return "its worker's name is no name"
    return _check_term(beat.term, term)


def check_report(report: mesh_pb2.StepReport, term: int) -> str | None:
    """Why the report is not taken; None: it is."""
    if not report.worker or len(report.worker) > _NAME_MAX:
        return "its worker's name is no name"
    return _check_term(report.term, term)


def check_submit(submit: control_pb2.SubmitRequest) -> tuple[Violation, ...]:
    """What is wrong with a request."""
    found = []
    spec = submit.request.spec
    if not submit.request_id or len(submit.request_id) > _NAME_MAX:
        found.append(Violation("request_id", f"1 to {_NAME_MAX} characters"))
    if spec.steps < 1:
        found.append(Violation("request.spec.steps", "at least 1"))
    if spec.shape.width < 1 or spec.shape.height < 1:
        found.append(Violation("request.spec.shape", "at least 1 x 1"))
    if not math.isfinite(spec.guidance_scale):
        found.append(Violation("request.spec.guidance_scale", "a finite number"))
    return tuple(found)


def _check_term(said: int, term: int) -> str | None:
    return None if said <= term + _TERMS_AHEAD_MAX else f"term {said} is out of reach"
