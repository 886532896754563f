"""The operations that workers run: what each takes, makes and needs. Without torch.

The three nodes of a model's plain chain are operations, too; theirs have no `BatchMember.call`, and
one artifact, the request's latents, whose name is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hocket.v1 import mesh_pb2, types_pb2


@dataclass(frozen=True)
class Operation:
    """A kind of call."""

    name: str
    inputs: tuple[str, ...]  # ports
    output: str  # port
    optional: frozenset[str] = frozenset()  # inputs that may be left out
    part: str = ""  # of its model: "text", "dit" or "vae"; none: no weights
    stepped: bool = False
    file: bool = False  # what it makes is a file, and leaves the worker


_ALL = (
    Operation("load_image", ("image",), "image"),
    Operation("load_mask", ("mask",), "mask"),
    Operation(
        "encode_prompt",
        ("prompt", "negative_prompt"),
        "embeddings",
        frozenset({"negative_prompt"}),
        part="text",
    ),
    Operation("encode_image", ("image",), "latents", part="vae"),
    Operation(
        "denoise",
        ("embeddings", "latents", "mask"),
        "latents",
        frozenset({"latents", "mask"}),
        part="dit",
        stepped=True,
    ),
    Operation("decode", ("latents",), "image", part="vae"),
    Operation("resize", ("image",), "image"),
    Operation("make_media", ("image",), "media", file=True),
)
OPERATIONS = {each.name: each for each in _ALL}
WEIGHTLESS = tuple(each.name for each in _ALL if not each.part)
CHAIN = {
    "text": Operation("text", (), "latents", part="text"),
    "dit": Operation("dit", ("latents",), "latents", part="dit", stepped=True),
    "vae": Operation("vae", ("latents",), "media", part="vae", file=True),
}


class Wanted(NamedTuple):
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
        known, name = OPERATIONS, first.call.op
    if name not in known:
        raise OperationRefused("op", name, ", ".join(known))
    return known[name]


def part_of(name: str) -> str:
    """Whose weights of a model an operation needs; none for an operation that is not known."""
    known = CHAIN.get(name) or OPERATIONS.get(name)
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


def wanted_by(operation: Operation, member: mesh_pb2.BatchMember) -> tuple[Wanted, ...]:
    """The artifacts that a job starts from, in an order that all members of a group agree on.

    A stepped call that has steps behind it goes on from its own latents, with which whatever it
    began from travels.
    """
    if not member.HasField("call"):
        chain = (Wanted("latents", "", member.first_step, member.holders),)
        return chain if operation.inputs else ()
    inputs, own = member.call.inputs, artifact_of(member)
    if operation.stepped and member.first_step:
        named = next((each.holders for each in inputs if each.artifact == own), ())
        return (Wanted(operation.output, own, member.first_step, member.holders or named),)
    return tuple(Wanted(i.port, i.artifact, i.version, i.holders) for i in inputs if i.artifact)
