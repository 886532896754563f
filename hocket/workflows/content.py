"""What a WorkflowSpec says, read: sources of ports, settings with their defaults, its digest.

Two specs that mean the same have the same digest: nodes and inputs count in the order of their
names, numbers by their value, a default that is written as if it were not (so that an operation can
get further settings, and the digests stay). Its own name does not count.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from typing import NamedTuple

from google.protobuf.struct_pb2 import Value

from hocket.v1.workflows_pb2 import WorkflowNode, WorkflowSpec
from hocket.workflows.catalogue import OPERATIONS, NumberSetting, SettingValue

DIGEST_SHOWN = 16  # hex digits of a digest in names
DIGEST_LEAST = 8  # fewer do not name a version
PROMPTS = ("prompt", "negative_prompt")  # inputs that are texts of the request itself
_NAMED = re.compile(rf"([a-z][a-z0-9-]{{0,63}})(?:@([0-9a-f]{{{DIGEST_LEAST},64}}))?")


class ArtifactSource(NamedTuple):
    """Where a port gets what it takes: an input of the workflow, or a port of another node."""

    input: str = ""
    node: str = ""
    port: str = ""


@lru_cache(4096)
def source_of(text: str) -> ArtifactSource | None:
    """What "$input" or "node.port" names; None where it is neither."""
    if text.startswith("$"):
        return ArtifactSource(input=text[1:]) if len(text) > 1 else None
    node, dot, port = text.partition(".")
    return ArtifactSource(node=node, port=port) if node and dot and port else None


def value_of(value: Value) -> SettingValue | bool | None:
    """A setting's value; None where it is neither a number, a text nor a truth value."""
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) < 1 << 53 else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None


def settings_of(node: WorkflowNode) -> dict[str, SettingValue]:
    """Every setting of a node, defaults filled in; those that are absent by default stay so.

    Of a node that has no faults.
    """
    found: dict[str, SettingValue] = {}
    for name, rule in OPERATIONS[node.op].settings.items():
        value = value_of(node.settings[name]) if name in node.settings else rule.default
        if value is not None:
            found[name] = float(value) if _is_fraction(rule, value) else value
    return found


def scale_of(node: WorkflowNode) -> float:
    """What the request's width and height are multiplied by for a node."""
    said = value_of(node.settings["scale"]) if "scale" in node.settings else 1.0
    return float(said) if isinstance(said, int | float) else 1.0


def filled(spec: WorkflowSpec) -> WorkflowSpec:
    """The same with all defaults written out. Of a spec that has no faults."""
    whole = WorkflowSpec()
    whole.CopyFrom(spec)
    for node in whole.nodes:
        for name, value in settings_of(node).items():
            if isinstance(value, str):
                node.settings[name].string_value = value
            else:
                node.settings[name].number_value = value
    return whole


def digest_of(spec: WorkflowSpec) -> str:
    """SHA-256 over the canonical content, in hex. Of a spec that has no faults."""
    content = {
        "description": spec.description,
        "inputs": {
            item.name: [int(item.type), item.optional, item.description] for item in spec.inputs
        },
        "nodes": {
            node.id: {
                "op": node.op,
                "model": node.model,
                "inputs": dict(node.inputs),
                "settings": _set_apart(node),
            }
            for node in spec.nodes
        },
        "output": spec.output,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _set_apart(node: WorkflowNode) -> dict[str, SettingValue]:
    """Settings that are not the defaults."""
    rules = OPERATIONS[node.op].settings
    return {name: v for name, v in settings_of(node).items() if v != rules[name].default}


def named(spec: WorkflowSpec) -> str:
    """The name of this very version: "two-pass@0123456789abcdef"."""
    return f"{spec.name}@{spec.digest[:DIGEST_SHOWN]}"


def parsed_name(text: str) -> tuple[str, str] | None:
    """Name and digest (or what is said of it; empty: nothing) of "name" or "name@digest"."""
    match = _NAMED.fullmatch(text)
    return None if match is None else (match[1], match[2] or "")


def is_called(spec: WorkflowSpec, name: str, digest: str) -> bool:
    """Whether a spec is what name and digest mean."""
    return spec.name == name and spec.digest.startswith(digest)


def _is_fraction(rule: object, value: object) -> bool:
    return isinstance(rule, NumberSetting) and not rule.whole and isinstance(value, int | float)
