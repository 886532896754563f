"""Errors that the world causes, each with the fields that explain it, and the one table between
them and gRPC statuses, in both directions.

A bug is an assertion and crashes; what callers, hosts and networks do is one of these. A status
carries google.rpc details (AIP-193): `ErrorInfo` with the reason and, in its metadata, the kind of
error; `BadRequest` with the field violations; `RetryInfo` where another try is worth it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from hocket.status_details import attached, detail, packed

DOMAIN = "hocket.dev"
_KIND = "kind"  # metadata key of ErrorInfo


@dataclass
class HocketError(Exception):
    """Base of all typed errors. `reason` is stable, upper-snake-case and part of the API."""

    @property
    def reason(self) -> str:
        return _upper_snake(type(self).__name__)

    def __str__(self) -> str:
        return self.reason


@dataclass
class _Told(HocketError):
    message: str

    def __str__(self) -> str:
        return self.message


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
    metadata: dict[str, str] = field(default_factory=dict)

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
class NotFinished(HocketError):
    """The request has no result (yet), or has not ended."""

    request_id: str
    state: str  # as GenerationState names it, without its prefix

    def __str__(self) -> str:
        return f"request {self.request_id!r} is {self.state.lower()}"


@dataclass
class UnknownWorker(HocketError):
    """No worker of that name has a living lease."""

    worker: str
    known: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"no living worker {self.worker!r}; known: {', '.join(self.known) or 'none'}"


@dataclass
class NotReady(HocketError):
    """The cluster cannot serve yet (or any more); a part of it is away. Another try may work."""

    message: str = "the cluster is not ready"
    retry_after_us: int = 1_000_000

    def __str__(self) -> str:
        return self.message


@dataclass
class NoWorkers(NotReady):
    """Control is there, and no worker that takes work is."""

    message: str = "no worker is connected (no lease is valid)"


@dataclass
class ControlUnavailable(NotReady):
    """No leader of the control plane was found, or it does not answer."""

    message: str = "the control plane does not answer"


@dataclass
class BrokerAway(NotReady):
    """What callers are told of BrokerUnavailable, whose URL is not theirs to know."""

    message: str = "the message broker does not answer"


@dataclass
class GatewayUnreachable(NotReady):
    """The connection to a gateway (or to control) was refused, or broke."""

    message: str = "the connection broke"
    retry_after_us: int = 0


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
    retry_after_us: int = 1_000_000

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


class NotAuthenticated(_Told):
    """The caller did not say who it is, or not so that it can be believed."""


@dataclass
class AccessDenied(HocketError):
    """The caller is known, and may not do this."""

    what: str
    who: str

    def __str__(self) -> str:
        return f"{self.who} may not use {self.what}"


class MeshStopped(_Told):
    """The mesh, or a part that it cannot do without, did not start or stopped."""


@dataclass
class NoMesh(MeshStopped):
    """No mesh was ever found here: nothing stopped."""


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
    NotFinished: grpc.StatusCode.FAILED_PRECONDITION,
    NotLeader: grpc.StatusCode.FAILED_PRECONDITION,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    BrokerUnavailable: grpc.StatusCode.UNAVAILABLE,
    PeerSilent: grpc.StatusCode.UNAVAILABLE,
    NotAuthenticated: grpc.StatusCode.UNAUTHENTICATED,
    AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    HocketError: grpc.StatusCode.INTERNAL,
}
# Reasons whose code is not that of their class.
_REASON_CODES: dict[str, grpc.StatusCode] = {
    **dict.fromkeys(("DEADLINE_UNATTAINABLE", "NOT_ENDED"), grpc.StatusCode.FAILED_PRECONDITION),
    "IDEMPOTENCY_KEY_REUSED": grpc.StatusCode.INVALID_ARGUMENT,
    **dict.fromkeys(("NO_WORKERS", "ROLES_NOT_SERVED"), grpc.StatusCode.UNAVAILABLE),
    "REJECTED_BY_POLICY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    **dict.fromkeys(("MODEL_NOT_SERVED", "WORKFLOW_NOT_SERVED"), grpc.StatusCode.NOT_FOUND),
    "LORA_NOT_SERVED": grpc.StatusCode.NOT_FOUND,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    **dict.fromkeys(("REQUEST_ID_REUSED", "INVALID_REQUEST"), grpc.StatusCode.INVALID_ARGUMENT),
    **dict.fromkeys(("UNKNOWN_REQUEST", "UNKNOWN_WORKFLOW"), grpc.StatusCode.NOT_FOUND),
    "CALLER_TOO_SLOW": grpc.StatusCode.DEADLINE_EXCEEDED,
    **dict.fromkeys(("MEDIA_CORRUPT", "MEDIA_LOST"), grpc.StatusCode.DATA_LOSS),
    "MEDIA_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
}

_AWAY: dict[str, type[NotReady]] = {
    kind.__name__: kind
    for kind in (NotReady, NoWorkers, ControlUnavailable, BrokerAway, GatewayUnreachable)
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
    return rpc_status.to_status(to_rpc_status(error))


def to_rpc_status(error: HocketError) -> status_pb2.Status:
    """The same as a message: what google.longrunning.Operation carries."""
    details = [packed(_error_info(error))]
    if isinstance(error, InvalidRequest):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        details.append(packed(bad))
    if wait_us := getattr(error, "retry_after_us", 0):
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(wait_us)
        details.append(packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = code_pb2.Code.Value(status_code(error).name)
    message = BrokerAway().message if isinstance(error, BrokerUnavailable) else str(error)
    return status_pb2.Status(code=code, message=message, details=details)


def from_rpc_error(error: grpc.aio.AioRpcError) -> HocketError:
    """The typed error that a failed call stands for."""
    return _from_status(attached(error), error.code(), error.details() or "")


def from_rpc_status(status: status_pb2.Status) -> HocketError:
    """The typed error that an operation's `error` stands for."""
    name = code_pb2.Code.Name(status.code)
    return _from_status(status, grpc.StatusCode[name], status.message)


def _from_status(status: status_pb2.Status, code: grpc.StatusCode, message: str) -> HocketError:
    info = detail(status.details, error_details_pb2.ErrorInfo)
    if info is not None and info.domain == DOMAIN:
        return _from_info(info, status, code)
    if code is grpc.StatusCode.UNAVAILABLE:
        return GatewayUnreachable(message)
    return CallFailed(code.name, message)


def _from_info(
    info: error_details_pb2.ErrorInfo, status: status_pb2.Status, code: grpc.StatusCode
) -> HocketError:
    facts = dict(info.metadata)
    match facts.pop(_KIND, ""):
        case "InvalidRequest":
            bad = detail(status.details, error_details_pb2.BadRequest)
            found = bad.field_violations if bad is not None else ()
            return InvalidRequest(tuple(Violation(v.field, v.description) for v in found))
        case "Refused":
            return Refused(info.reason, status.message, _retry_us(status), facts)
        case "RequestFailed":
            return RequestFailed(info.reason, status.message, facts)
        case "UnknownRequest":
            return UnknownRequest(facts.get("request_id", ""))
        case "NotFinished":
            return NotFinished(facts.get("request_id", ""), facts.get("state", ""))
        case "UnknownWorker":
            known = tuple(name for name in facts.get("known", "").split(",") if name)
            return UnknownWorker(facts.get("worker", ""), known)
        case "NotAuthenticated":
            return NotAuthenticated(status.message)
        case "AccessDenied":
            return AccessDenied(facts.get("what", ""), facts.get("who", ""))
        case "NotLeader":
            return NotLeader(facts.get("leader", ""))
        case "BrokerUnavailable":
            return BrokerAway(status.message, _retry_us(status))
        case kind if kind in _AWAY:
            return _AWAY[kind](status.message, _retry_us(status))
        case _ if code is grpc.StatusCode.UNAVAILABLE:
            return NotReady(status.message, _retry_us(status))
        case _:
            return CallFailed(code.name, status.message)


def _retry_us(status: status_pb2.Status) -> int:
    retry = detail(status.details, error_details_pb2.RetryInfo)
    return retry.retry_delay.ToMicroseconds() if retry is not None else 0


def _error_info(error: HocketError) -> error_details_pb2.ErrorInfo:
    facts = {_KIND: type(error).__name__}
    match error:
        case Refused(metadata=metadata) | RequestFailed(metadata=metadata):
            facts = {**metadata, **facts}
        case NotFinished(request_id=request_id, state=state):
            facts |= {"request_id": request_id, "state": state}
        case AccessDenied(what=what, who=who):
            facts |= {"what": what, "who": who}
        case NotLeader(leader=leader):
            facts["leader"] = leader
        case UnknownRequest(request_id=request_id):
            facts["request_id"] = request_id
        case UnknownWorker(worker=worker, known=known):
            facts |= {"worker": worker, "known": ",".join(known)}
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts)


def _upper_snake(name: str) -> str:
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()
