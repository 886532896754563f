"""Workflow files, TOML or JSON: what an operator writes.

    description = "A picture made over, as its prompt says"
    output = "media.media"

    [inputs.prompt]
    type = "text"

    [inputs.image]
    type = "file"

    [[nodes]]
    id = "encode"
    op = "encode_image"
    inputs = { image = "load.image" }
    settings = { scale = 0.5 }

What is wrong is told all at once, with paths as WorkflowSpec has them and lines of the file.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hocket.errors import InvalidRequest, Violation
from hocket.v1.workflows_pb2 import PortType, WorkflowSpec
from hocket.workflows.catalogue import FILE, TEXT
from hocket.workflows.checking import faults
from hocket.workflows.content import value_of

FILE_BYTES_MAX = 256 << 10
SUFFIXES = (".toml", ".json")
_TYPES: Mapping[str, PortType.ValueType] = {"text": TEXT, "file": FILE}
_KEYS = ("name", "description", "inputs", "nodes", "output")
_INPUT_KEYS = ("type", "optional", "description")
_NODE_KEYS = ("id", "op", "model", "inputs", "settings")


def read_file(path: Path) -> WorkflowSpec:
    """The workflow in a file; its name is the file's unless it says another.

    Raises InvalidRequest with all faults, those of the workflow itself included.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise _wrong_file(path, f"more than {FILE_BYTES_MAX} bytes", "a smaller file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _wrong_file(path, error.strerror or "no file", "a file that can be read") from None
    except UnicodeDecodeError:
        raise _wrong_file(path, "no UTF-8", "text") from None
    return read_text(text, path)


def read_text(text: str, path: Path) -> WorkflowSpec:
    """The same of a file's text; `path` is what it is called."""
    if path.suffix.lower() not in SUFFIXES:
        raise _wrong_file(path, repr(path.suffix), f"a name with {' or '.join(SUFFIXES)}")
    try:
        document = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _wrong_file(path, str(error), "TOML") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} (at line {error.lineno}, column {error.colno})"
        raise _wrong_file(path, where, "JSON") from None
    except RecursionError:
        raise _wrong_file(path, "tables in tables without end", "a workflow") from None
    spec, found = read_document(document, path.stem)
    found += [fault for fault in faults(spec) if not _is_told(fault, found)]
    if found:
        lines = _lines(text, spec) if path.suffix.lower() == ".toml" else {}
        raise InvalidRequest(tuple(_with_line(fault, lines) for fault in found))
    return spec


def read_document(document: object, name: str) -> tuple[WorkflowSpec, list[Violation]]:
    """The workflow that a file's tables say, and what of them is none of its fields."""
    reader = _DocumentReader()
    whole = reader.table(document, "", _KEYS)
    spec = WorkflowSpec(
        name=reader.text(whole, "name", "name") or name,
        description=reader.text(whole, "description", "description"),
        output=reader.text(whole, "output", "output"),
    )
    for index, (key, value) in enumerate(reader.table(whole.get("inputs", {}), "inputs").items()):
        at = f"inputs[{index}]"
        item = reader.table(value, at, _INPUT_KEYS)
        kind = reader.text(item, "type", f"{at}.type")
        if kind not in _TYPES:
            reader.add(f"{at}.type", repr(kind), ", ".join(_TYPES))
        spec.inputs.add(
            name=key,
            type=_TYPES.get(kind, PortType.PORT_TYPE_UNSPECIFIED),
            optional=reader.truth(item, "optional", f"{at}.optional"),
            description=reader.text(item, "description", f"{at}.description"),
        )
    for index, value in enumerate(reader.list(whole.get("nodes", []), "nodes")):
        _read_node(reader, spec, value, f"nodes[{index}]")
    return spec, reader.found


def to_document(spec: WorkflowSpec) -> dict[str, object]:
    """A workflow as a JSON file has it."""
    names = {kind: name for name, kind in _TYPES.items()}
    inputs = {}
    for item in spec.inputs:
        told: dict[str, object] = {"type": names.get(item.type, "")}
        if item.optional:
            told["optional"] = True
        if item.description:
            told["description"] = item.description
        inputs[item.name] = told
    nodes = []
    for node in spec.nodes:
        entry: dict[str, object] = {"id": node.id, "op": node.op}
        if node.model:
            entry["model"] = node.model
        entry["inputs"] = {port: node.inputs[port] for port in sorted(node.inputs)}
        if node.settings:
            entry["settings"] = {name: value_of(v) for name, v in sorted(node.settings.items())}
        nodes.append(entry)
    return {
        "name": spec.name,
        "description": spec.description,
        "inputs": inputs,
        "nodes": nodes,
        "output": spec.output,
    }


def _read_node(reader: _DocumentReader, spec: WorkflowSpec, value: object, at: str) -> None:
    entry = reader.table(value, at, _NODE_KEYS)
    node = spec.nodes.add(
        id=reader.text(entry, "id", f"{at}.id"),
        op=reader.text(entry, "op", f"{at}.op"),
        model=reader.text(entry, "model", f"{at}.model"),
    )
    ports = reader.table(entry.get("inputs", {}), f"{at}.inputs")
    for port in ports:
        node.inputs[port] = reader.text(ports, port, f"{at}.inputs.{port}")
    for name, said in reader.table(entry.get("settings", {}), f"{at}.settings").items():
        if isinstance(said, bool):
            node.settings[name].bool_value = said
        elif isinstance(said, int | float):
            node.settings[name].number_value = float(said)
        elif isinstance(said, str):
            node.settings[name].string_value = said
        else:
            reader.add(f"{at}.settings.{name}", _kind(said), "a number or a text")


@dataclass
class _DocumentReader:
    """Takes tables apart; what is not as it has to be is noted, and read as nothing."""

    found: list[Violation]

    def __init__(self) -> None:
        self.found = []

    def add(self, path: str, found: str, allowed: str) -> None:
        self.found.append(Violation(path, f"found {found[:60]}; allowed: {allowed}"))

    def table(self, value: object, at: str, keys: tuple[str, ...] = ()) -> dict[str, object]:
        if not isinstance(value, dict):
            self.add(at, _kind(value), "a table")
            return {}
        for key in value:
            if keys and key not in keys:
                self.add(f"{at}.{key}".lstrip("."), "a key that is not known", ", ".join(keys))
        return value

    def list(self, value: object, at: str) -> list[object]:
        if isinstance(value, list):
            return value
        self.add(at, _kind(value), "a list of tables")
        return []

    def text(self, table: Mapping[str, object], key: str, at: str) -> str:
        value = table.get(key, "")
        if isinstance(value, str):
            return value
        self.add(at, f"{value!r}", "a text")
        return ""

    def truth(self, table: Mapping[str, object], key: str, at: str) -> bool:
        value = table.get(key, False)
        if isinstance(value, bool):
            return value
        self.add(at, f"{value!r}", "true or false")
        return False


def _kind(value: object) -> str:
    words = {str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return words.get(type(value), "a list" if isinstance(value, list) else "a table")


def _wrong_file(path: Path, found: str, allowed: str) -> InvalidRequest:
    return InvalidRequest((Violation(str(path), f"found {found}; allowed: {allowed}"),))


def _is_told(fault: Violation, found: list[Violation]) -> bool:
    return any(fault.field == known.field for known in found)


# -------------------------------------------------------------------------------- lines


def _lines(text: str, spec: WorkflowSpec) -> dict[str, int]:
    """Where a TOML file says what, by path: tables and the keys in them, each on a line's start."""
    found: dict[str, int] = {}
    names, at, nodes = [item.name for item in spec.inputs], "", -1
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if re.match(r"\[\[\s*nodes\s*\]\]", bare):
            nodes += 1
            at = f"nodes[{nodes}]"
            found[at] = number
        elif (table := re.match(r"\[\s*(inputs|nodes)\.\s*\"?([\w-]+)\"?\s*\]", bare)) is not None:
            if table[1] == "nodes":  # [nodes.inputs]: of the last node
                at = f"nodes[{nodes}].{table[2]}"
            elif table[2] in names:
                at = f"inputs[{names.index(table[2])}]"
            found.setdefault(at, number)
        elif (key := re.match(r"\"?([\w-]+)\"?\s*=", bare)) is not None:
            found.setdefault(f"{at}.{key[1]}".lstrip("."), number)
    return found


def _with_line(fault: Violation, lines: Mapping[str, int]) -> Violation:
    path = fault.field
    while path:
        if path in lines:
            return Violation(fault.field, f"{fault.description} (line {lines[path]})")
        path = path.rpartition(".")[0]
    return fault
