"""Answers of admission that are no new promise: refusals, each with its cause, and repeats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from control.requests.records import Record
from hocket.errors import HocketError, Refused, Violation
from hocket.v1 import control_pb2, generation_pb2, types_pb2
from hocket.workflows.roles import ROLE_OPERATIONS

_RETRY_US = 2_000_000
_RETRY_SOON_US = 500_000


def no_workers() -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="NO_WORKERS",
        message="no worker is connected (no lease is valid)",
        retry_after_us=_RETRY_US,
    )


def not_served(model: str, served: Iterable[str]) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="MODEL_NOT_SERVED",
        message=f"no living worker serves {model!r}; served: {', '.join(sorted(served))}",
    )


def operation_not_served(
    workflow: str, node: str, operation: str, model: generation_pb2.ModelInfo, port: str = ""
) -> types_pb2.Failure:
    """`port`: the port of the node that needs the operation; empty: the call itself does."""
    where = f"node {node!r}, port {port!r}" if port else f"node {node!r}"
    return types_pb2.Failure(
        reason="WORKFLOW_NOT_SERVED",
        message=(
            f"workflow {workflow!r} needs the operation {operation!r} ({where}) of "
            f"{model.name!r}, which no living worker serves"
        ),
        metadata={"node": node, "operation": operation, "model": model.name}
        | ({"port": port} if port else {}),
    )


def lora_not_served(name: str, model: generation_pb2.ModelInfo) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="LORA_NOT_SERVED",
        message=(
            f"no living worker serves the adapter {name!r} of {model.name!r}; served: "
            f"{', '.join(model.adapters) or 'none'}"
        ),
        metadata={"lora": name, "model": model.name},
    )


def sizes_not_served(
    workflow: str, shape: types_pb2.Shape, models: Iterable[str]
) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="WORKFLOW_NOT_SERVED",
        message=(
            f"workflow {workflow!r} has no size near {shape.width}x{shape.height} that "
            f"{', '.join(models)} all take"
        ),
    )


def roles_missing(model: generation_pb2.ModelInfo, needed: Sequence[str]) -> types_pb2.Failure:
    """`needed`: those of its nodes that a request runs and nobody serves."""
    operations = [ROLE_OPERATIONS[role] for role in needed]
    return types_pb2.Failure(
        reason="ROLES_NOT_SERVED",
        message=(
            f"no living worker serves {' and '.join(operations)} of {model.name!r}: missing roles "
            f"{', '.join(needed)} (workers start with all of them, or those that --role names)"
        ),
        retry_after_us=_RETRY_US,
        metadata={
            "model": model.name,
            "roles": ",".join(needed),
            "operations": ",".join(operations),
        },
    )


def queue_full(open_max: int) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="QUEUE_FULL",
        message=f"{open_max} requests are open, the limit of this cluster",
        retry_after_us=_RETRY_US,
    )


def overloaded(waiting_max: int) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="OVERLOADED",
        message=f"{waiting_max} requests wait for admission, the limit of this leader",
        retry_after_us=_RETRY_SOON_US,
    )


def expired() -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="EXPIRED", message="the caller gave up before the request was admitted"
    )


def of(error: HocketError) -> types_pb2.Failure:
    """What the promises stream did not take."""
    retry_us = error.retry_after_us if isinstance(error, Refused) else 0
    return types_pb2.Failure(reason=error.reason, message=str(error), retry_after_us=retry_us)


def invalid(
    submit: control_pb2.SubmitRequest, violations: Sequence[Violation]
) -> control_pb2.SubmitResponse:
    told = "; ".join(f"{v.field}: {v.description}" for v in violations)
    return rejected(submit, types_pb2.Failure(reason="INVALID_REQUEST", message=told))


def key_reused(submit: control_pb2.SubmitRequest, known: Record) -> control_pb2.SubmitResponse:
    """The same key, or the same id, for another wish."""
    field = "request_id" if known.id == submit.request_id else "idempotency_key"
    return rejected(
        submit,
        types_pb2.Failure(
            reason="IDEMPOTENCY_KEY_REUSED",
            message=f"{field}: an earlier call with the same value asked for something else",
        ),
    )


def rejected(
    submit: control_pb2.SubmitRequest, failure: types_pb2.Failure
) -> control_pb2.SubmitResponse:
    return control_pb2.SubmitResponse(rejected=failure, request_id=submit.request_id)


def repeat(record: Record) -> control_pb2.SubmitResponse:
    """Answers a repeated call from what became of the first one."""
    answer = control_pb2.SubmitResponse(request_id=record.id)
    if record.ended is None:
        answer.accepted.CopyFrom(record.accepted)
    elif record.ended.HasField("finished"):
        answer.already_finished.CopyFrom(record.ended.finished)
    elif record.ended.HasField("failed"):
        answer.rejected.CopyFrom(record.ended.failed)
        answer.rejected.metadata["ended"] = "1"  # it was promised, and told to have failed
    else:
        answer.rejected.reason = "CANCELLED"
        answer.rejected.message = f"request {record.id} was cancelled"
    return answer
