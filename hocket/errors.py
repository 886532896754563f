"""Errors that the world causes, each with the fields that explain it, and the one table between
them and gRPC statuses, in both directions.

A bug is an assertion and crashes; what callers, hosts and networks do is one of these. A status
carries google.rpc details (AIP-193): `ErrorInfo` with the reason and, in its metadata, the kind of
error; `BadRequest` with the field violations; `RetryInfo` where another try is worth it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "hocket.dev"
_KIND = "kind"  # metadata key of ErrorInfo
_D = TypeVar("_D", bound=Message)


@dataclass
class HocketError(Exception):
    """Base of all typed errors. `reason` is stable, upper-snake-case and part of the API."""

    @property
    def reason(self) -> str:
        return _upper_snake(type(self).__name__)

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Violation:
    """One thing wrong with one field."""

    field: str  # path in the request message, for example "spec.shape.width"
    description: str  # the value found and what is allowed


@dataclass
class InvalidRequest(HocketError):
    """The request itself is wrong; nothing was queued."""

    violations: tuple[Violation, ...]

    def __str__(self) -> str:
        return "; ".join(f"{v.field}: {v.description}" for v in self.violations)


@dataclass
class Refused(HocketError):
    """The request is well-formed, and control refused it."""

    why: str  # reason of the Failure message
    message: str
    retry_after_us: int = 0
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        return self.why

    def __str__(self) -> str:
        return self.message


@dataclass
class RequestFailed(HocketError):
    """An accepted request could not be finished."""

    why: str
    message: str

    @property
    def reason(self) -> str:
        return self.why

    def __str__(self) -> str:
        return self.message


@dataclass
class UnknownRequest(HocketError):
    """No such request is known to this cluster."""

    request_id: str

    def __str__(self) -> str:
        return f"no request {self.request_id!r} is known here"


@dataclass
class UnknownWorker(HocketError):
    """No worker of that name has a living lease."""

    worker: str
    known: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"no living worker {self.worker!r}; known: {', '.join(self.known) or 'none'}"


@dataclass
class NotReady(HocketError):
    """The cluster cannot serve yet (or any more): no worker has a living lease."""

    message: str = "no worker has a living lease"

    def __str__(self) -> str:
        return self.message


@dataclass
class NotLeader(HocketError):
    """This control replica does not lead."""

    leader: str = ""  # "host:port" of the one that does; empty: not known

    def __str__(self) -> str:
        return f"this replica does not lead; leader: {self.leader or 'not known'}"


@dataclass
class BrokerUnavailable(HocketError):
    """nats-server cannot be reached."""

    url: str
    cause: str

    def __str__(self) -> str:
        return f"cannot reach the broker at {self.url}: {self.cause}"


@dataclass
class PeerSilent(HocketError):
    """Nobody answered a request on the bus."""

    subject: str
    waited_us: int

    def __str__(self) -> str:
        return f"no answer on {self.subject} within {self.waited_us / 1e6:.3f} s"


@dataclass
class CallFailed(HocketError):
    """A call ended with a status that is none of Hocket's own, for example DEADLINE_EXCEEDED."""

    code: str  # name of the gRPC status code
    message: str

    @property
    def reason(self) -> str:
        return self.code

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass
class MeshStopped(HocketError):
    """The mesh, or a part that it cannot do without, did not start or stopped."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass
class WrongConfig(HocketError):
    """A setting is wrong; the process stops."""

    key: str
    value: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r} is not allowed; allowed: {self.allowed}"


# The one table. Looked up along the exception's MRO.
_CODES: dict[type[HocketError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Refused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RequestFailed: grpc.StatusCode.ABORTED,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    UnknownWorker: grpc.StatusCode.NOT_FOUND,
    NotLeader: grpc.StatusCode.FAILED_PRECONDITION,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    BrokerUnavailable: grpc.StatusCode.UNAVAILABLE,
    PeerSilent: grpc.StatusCode.UNAVAILABLE,
    HocketError: grpc.StatusCode.INTERNAL,
}
# Reasons whose code is not that of their class.
_REASON_CODES: dict[str, grpc.StatusCode] = {
    "DEADLINE_UNATTAINABLE": grpc.StatusCode.FAILED_PRECONDITION,
    "IDEMPOTENCY_KEY_REUSED": grpc.StatusCode.INVALID_ARGUMENT,
    "NO_WORKERS": grpc.StatusCode.UNAVAILABLE,
    "REJECTED_BY_POLICY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "MODEL_NOT_SERVED": grpc.StatusCode.NOT_FOUND,
    "CANCELLED": grpc.StatusCode.CANCELLED,
}


def status_code(error: HocketError) -> grpc.StatusCode:
    """The gRPC status code of a typed error."""
    if isinstance(error, CallFailed):
        return grpc.StatusCode[error.code]
    if error.reason in _REASON_CODES:
        return _REASON_CODES[error.reason]
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def to_status(error: HocketError) -> grpc.Status:
    """A status with google.rpc details, for `context.abort_with_status`."""
    details = [_packed(_error_info(error))]
    if isinstance(error, InvalidRequest):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        details.append(_packed(bad))
    if isinstance(error, Refused) and error.retry_after_us:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(error.retry_after_us)
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = code_pb2.Code.Value(status_code(error).name)
    return rpc_status.to_status(status_pb2.Status(code=code, message=str(error), details=details))


def from_rpc_error(error: grpc.aio.AioRpcError) -> HocketError:
    """The typed error that a failed call stands for."""
    code = error.code()
    message = error.details() or ""
    status = _attached_status(error)
    info = _detail(status.details, error_details_pb2.ErrorInfo)
    if info is not None and info.domain == DOMAIN:
        return _from_info(info, status, code)
    if code is grpc.StatusCode.UNAVAILABLE:
        return NotReady(message)
    return CallFailed(code.name, message)


def _from_info(
    info: error_details_pb2.ErrorInfo, status: status_pb2.Status, code: grpc.StatusCode
) -> HocketError:
    facts = dict(info.metadata)
    match facts.pop(_KIND, ""):
        case "InvalidRequest":
            bad = _detail(status.details, error_details_pb2.BadRequest)
            found = bad.field_violations if bad is not None else ()
            return InvalidRequest(tuple(Violation(v.field, v.description) for v in found))
        case "Refused":
            retry = _detail(status.details, error_details_pb2.RetryInfo)
            wait_us = retry.retry_delay.ToMicroseconds() if retry is not None else 0
            return Refused(info.reason, status.message, wait_us, facts)
        case "RequestFailed":
            return RequestFailed(info.reason, status.message)
        case "UnknownRequest":
            return UnknownRequest(facts.get("request_id", ""))
        case "UnknownWorker":
            known = tuple(name for name in facts.get("known", "").split(",") if name)
            return UnknownWorker(facts.get("worker", ""), known)
        case "NotLeader":
            return NotLeader(facts.get("leader", ""))
        case _ if code is grpc.StatusCode.UNAVAILABLE:
            return NotReady(status.message)
        case _:
            return CallFailed(code.name, status.message)


def _error_info(error: HocketError) -> error_details_pb2.ErrorInfo:
    facts = {_KIND: type(error).__name__}
    match error:
        case Refused(metadata=metadata):
            facts = {**metadata, **facts}
        case NotLeader(leader=leader):
            facts["leader"] = leader
        case UnknownRequest(request_id=request_id):
            facts["request_id"] = request_id
        case UnknownWorker(worker=worker, known=known):
            facts |= {"worker": worker, "known": ",".join(known)}
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts)


def _attached_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status(message=error.details() or "")


def _detail(details: Iterable[any_pb2.Any], kind: type[_D]) -> _D | None:
    for packed in details:
        if packed.TypeName() == kind.DESCRIPTOR.full_name:
            return kind.FromString(packed.value)
    return None


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _upper_snake(name: str) -> str:
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()
