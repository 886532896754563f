"""The operations that workers run: what each takes, makes and needs. Without torch.

Those of workflows are the catalogue's. The three nodes of a model's plain chain are operations,
too: without a `BatchMember.call`, and with one artifact, the request's latents, whose name is
empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from google.protobuf.struct_pb2 import Value

from hocket.v1 import mesh_pb2, types_pb2
from hocket.workflows.catalogue import FILE, OPERATIONS, OperationRule, SettingValue
from hocket.workflows.content import value_of


@dataclass(frozen=True)
class Operation:
    """A kind of call."""

    name: str
    output: str  # port
    inputs: tuple[str, ...] = ()  # ports
    part: str = ""  # of its model: "text", "dit" or "vae"; none: no weights
    stepped: bool = False
    file: bool = False  # what it makes is a file, and leaves the worker

    @classmethod
    def of(cls, rule: OperationRule) -> Operation:
        """A workflow's."""
        made = rule.outputs[0]
        inputs = tuple(port.name for port in rule.inputs)
        return cls(rule.name, made.name, inputs, rule.part, rule.stepped, file=made.type == FILE)


CALLS = {name: Operation.of(rule) for name, rule in OPERATIONS.items()}
WEIGHTLESS: Final = tuple(name for name, each in CALLS.items() if not each.part)
CHAIN = {
    "text": Operation("text", "latents", part="text"),
    "dit": Operation("dit", "latents", ("latents",), part="dit", stepped=True),
    "vae": Operation("vae", "media", ("latents",), part="vae", file=True),
}
ROLES: Final = tuple(CHAIN)  # nodes whose weights a worker may hold, any of them


def offered(operations: Sequence[str], roles: Collection[str]) -> tuple[str, ...]:
    """Those of a model's operations ("denoise", "denoise.mask" ...) that these weights are for."""
    return tuple(each for each in operations if part_of(each.partition(".")[0]) in roles)


class CallInput(NamedTuple):
    """An artifact that a call starts from."""

    port: str
    artifact: str
    version: int  # steps behind it
    holders: Sequence[types_pb2.LatentHolder]  # best first


class OperationRefused(Exception):
    """Something that an operation cannot be called with. Fields: `field`, `value`, `allowed`."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value}: allowed is {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


def operation_of(assignment: mesh_pb2.Assignment) -> Operation:
    """What an assignment does. Raises `OperationRefused`."""
    first = assignment.batch[0]
    known, name = CHAIN, assignment.node
    if first.HasField("call"):
        known, name = CALLS, first.call.op
    if name not in known:
        raise OperationRefused("op", name, ", ".join(known))
    return known[name]


def part_of(name: str) -> str:
    """Whose weights of a model an operation needs; none for an operation that is not known."""
    known = CHAIN.get(name) or CALLS.get(name)
    return "" if known is None else known.part


def model_of(member: mesh_pb2.BatchMember) -> str:
    """Whose weights a job's call uses, if it uses any."""
    return member.call.model or member.spec.model


def shape_of(member: mesh_pb2.BatchMember) -> types_pb2.Shape:
    """Of what the call makes."""
    return member.call.shape if member.HasField("call") else member.spec.shape


def artifact_of(member: mesh_pb2.BatchMember) -> str:
    """Name of what the call makes; empty: the latents of a plain chain."""
    return member.call.outputs[0] if member.call.outputs else ""


def wanted_by(operation: Operation, member: mesh_pb2.BatchMember) -> tuple[CallInput, ...]:
    """The artifacts that a job starts from, in an order that all members of a group agree on.

    A stepped call that has steps behind it goes on from its own latents, with which whatever it
    began from travels.
    """
    if not member.HasField("call"):
        chain = (CallInput("latents", "", member.first_step, member.holders),)
        return chain if operation.inputs else ()
    inputs, own = member.call.inputs, artifact_of(member)
    if operation.stepped and member.first_step:
        named = next((_named_holders(each) for each in inputs if each.artifact == own), ())
        return (CallInput(operation.output, own, member.first_step, named or member.holders),)
    return tuple(
        CallInput(each.port, each.artifact, each.version, _named_holders(each))
        for each in inputs
        if each.artifact and each.artifact != own
    )


def _named_holders(given: mesh_pb2.NodeInput) -> tuple[types_pb2.LatentHolder, ...]:
    """Holders of an input; they are named for that very version."""
    return tuple(
        types_pb2.LatentHolder(
            worker=each.worker, steps_done=given.version, store_address=each.store_address
        )
        for each in given.holders
    )


def settings_of(op: str, values: Mapping[str, Value]) -> dict[str, SettingValue]:
    """Settings of a call by name, defaults filled in; those that are absent by default stay so.

    Control has checked them, too; what arrives from the bus may have been made by anybody. Raises
    `OperationRefused` for what is not known, or cannot be.
    """
    rules = OPERATIONS[op].settings
    for name in values:
        if name not in rules:
            raise OperationRefused("settings", name, ", ".join(rules))
    found: dict[str, SettingValue] = {}
    for name, rule in rules.items():
        value = value_of(values[name]) if name in values else None
        if value is None:
            value = rule.default
        elif isinstance(value, bool) or not rule.takes(value):
            raise OperationRefused(f"settings.{name}", str(value)[:64], rule.allowed)
        if value is not None:
            found[name] = value
    return found
