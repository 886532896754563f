"""What is wrong with a workflow: every fault at once, each with its path in the WorkflowSpec.

    nodes[3].inputs.latents: found encode.image; allowed: LATENTS, as of encode.latents

What depends on the models that are served (shapes, numbers of steps) is for whoever knows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from hocket.errors import InvalidRequest, Violation
from hocket.v1.workflows_pb2 import PortType, WorkflowNode, WorkflowSpec
from hocket.workflows import sizes
from hocket.workflows.catalogue import FILE, OPERATIONS, TEXT, OperationPort, OperationRule
from hocket.workflows.catalogue import port_type_name as type_name
from hocket.workflows.content import PROMPTS, source_of, value_of
from hocket.workflows.graph import WorkflowGraph, graph_of

NODES_MAX = 64
STEPPED_MAX = 8
INPUTS_MAX = 32
DESCRIPTION_CHARS_MAX = 500
SPEC_BYTES_MAX = 32 << 10
_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_NAMED_SO = "1 to 64 of a-z 0-9 and hyphens, a letter first"
_ID = re.compile(r"[a-z][a-z0-9-]{0,31}")
_ID_SO = "1 to 32 of a-z 0-9 and hyphens, a letter first"
_INPUT = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_INPUT_SO = "1 to 32 of a-z 0-9, hyphens and underscores, a letter first"
_MODEL = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+/:@-]{0,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SHOWN_CHARS = 60
_KEPT_MAX = 512


def faults(spec: WorkflowSpec) -> tuple[Violation, ...]:
    """All that is wrong with it; empty: nothing is."""
    size = spec.ByteSize()
    if size > SPEC_BYTES_MAX:
        return (_fault("", f"{size} bytes", f"at most {SPEC_BYTES_MAX} bytes in all"),)
    return _faults(spec.SerializeToString(deterministic=True))


@lru_cache(_KEPT_MAX)  # each request brings its workflow, and most bring the same
def _faults(content: bytes) -> tuple[Violation, ...]:
    spec = WorkflowSpec.FromString(content)
    if len(spec.nodes) > NODES_MAX:
        return (_fault("nodes", f"{len(spec.nodes)} nodes", f"1 to {NODES_MAX}"),)
    reading = _Reading.of(spec)
    found = [*_faults_of_names(spec), *_faults_of_inputs(spec)]
    for index, node in enumerate(spec.nodes):
        found += _faults_of_node(reading, f"nodes[{index}]", index, node)
    found += _faults_of_output(reading)
    found += _faults_of_stepped(spec)
    found += _faults_of_graph(reading)
    return tuple(found)


def checked(spec: WorkflowSpec) -> WorkflowSpec:
    """The same spec; raises InvalidRequest with all of its faults."""
    if found := faults(spec):
        raise InvalidRequest(found)
    return spec


@dataclass(frozen=True)
class _Reading:
    """A spec with what its parts are looked up by."""

    spec: WorkflowSpec
    inputs: Mapping[str, PortType.ValueType]
    optional: frozenset[str]  # inputs that may be left out
    places: Mapping[str, int]  # of nodes by id; of those used twice the first
    graph: WorkflowGraph

    @classmethod
    def of(cls, spec: WorkflowSpec) -> _Reading:
        places: dict[str, int] = {}
        for index, node in enumerate(spec.nodes):
            places.setdefault(node.id, index)
        inputs = {item.name: item.type for item in spec.inputs}
        optional = frozenset(item.name for item in spec.inputs if item.optional)
        return cls(spec, inputs, optional, places, graph_of(spec))

    def rule(self, node_id: str) -> OperationRule | None:
        """Of a node by its id; None where there is none, or its operation is unknown."""
        place = self.places.get(node_id)
        return None if place is None else OPERATIONS.get(self.spec.nodes[place].op)


def _fault(path: str, found: object, allowed: str) -> Violation:
    shown = str(found)
    if len(shown) > _SHOWN_CHARS:
        shown = f"{shown[:_SHOWN_CHARS]}…"
    return Violation(path, f"found {shown}; allowed: {allowed}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


# -------------------------------------------------------------------------------- the whole


def _faults_of_names(spec: WorkflowSpec) -> Iterator[Violation]:
    if not _NAME.fullmatch(spec.name):
        yield _fault("name", repr(spec.name), _NAMED_SO)
    text = spec.description
    if len(text) > DESCRIPTION_CHARS_MAX:
        allowed = f"at most {DESCRIPTION_CHARS_MAX} characters"
        yield _fault("description", f"{len(text)} characters", allowed)
    if control := _CONTROL.search(text):
        yield _fault("description", repr(control[0]), "one line without control characters")


def _faults_of_inputs(spec: WorkflowSpec) -> Iterator[Violation]:
    if len(spec.inputs) > INPUTS_MAX:
        yield _fault("inputs", f"{len(spec.inputs)} inputs", f"at most {INPUTS_MAX}")
    seen: set[str] = set()
    for index, item in enumerate(spec.inputs):
        at = f"inputs[{index}]"
        if not _INPUT.fullmatch(item.name):
            yield _fault(f"{at}.name", repr(item.name), _INPUT_SO)
        elif item.name in seen:
            yield _fault(f"{at}.name", item.name, "each name once")
        seen.add(item.name)
        wanted = TEXT if item.name in PROMPTS else FILE
        if item.type != wanted:
            why = "a text of the request" if wanted == TEXT else "only prompts are texts"
            yield _fault(f"{at}.type", type_name(item.type), f"{type_name(wanted)} ({why})")
        if len(item.description) > DESCRIPTION_CHARS_MAX or _CONTROL.search(item.description):
            allowed = f"at most {DESCRIPTION_CHARS_MAX} characters in one line"
            yield _fault(f"{at}.description", repr(item.description), allowed)


def _faults_of_output(reading: _Reading) -> Iterator[Violation]:
    spec = reading.spec
    offered = [
        f"{node.id}.{port.name}"
        for node in spec.nodes
        if (rule := OPERATIONS.get(node.op)) is not None
        for port in rule.outputs
        if port.type == FILE
    ]
    source = source_of(spec.output)
    rule = reading.rule(source.node) if source is not None else None
    port = rule.output(source.port) if rule is not None and source is not None else None
    if source is None or port is None or port.type != FILE:
        allowed = f"a FILE that a node makes: {_list(offered)}"
        yield _fault("output", spec.output or "nothing", allowed)


def _faults_of_stepped(spec: WorkflowSpec) -> Iterator[Violation]:
    stepped = [n.id for n in spec.nodes if (r := OPERATIONS.get(n.op)) is not None and r.stepped]
    if not 1 <= len(stepped) <= STEPPED_MAX:
        names = _list(rule.name for rule in OPERATIONS.values() if rule.stepped)
        allowed = f"1 to {STEPPED_MAX} nodes of a stepped operation ({names})"
        yield _fault("nodes", f"{len(stepped)} stepped nodes", allowed)


# -------------------------------------------------------------------------------- a node


def _faults_of_node(
    reading: _Reading, at: str, index: int, node: WorkflowNode
) -> Iterator[Violation]:
    if not _ID.fullmatch(node.id):
        yield _fault(f"{at}.id", repr(node.id), _ID_SO)
    elif reading.places[node.id] != index:
        yield _fault(f"{at}.id", node.id, f"each id once (nodes[{reading.places[node.id]}] has it)")
    rule = OPERATIONS.get(node.op)
    if rule is None:
        yield _fault(f"{at}.op", repr(node.op), _list(OPERATIONS))
        return
    if node.model and not rule.part:
        yield _fault(f"{at}.model", node.model, f"none ({node.op} needs no weights)")
    elif node.model and not _MODEL.fullmatch(node.model):
        yield _fault(f"{at}.model", repr(node.model), "a model's name, as `hocket models` lists it")
    for name in sorted(node.inputs):
        port = rule.input(name)
        if port is None:
            allowed = _list(port.name for port in rule.inputs)
            yield _fault(f"{at}.inputs.{name}", "no port of that name", f"{allowed} ({node.op})")
        else:
            yield from _faults_of_source(reading, f"{at}.inputs.{name}", node, port)
    for port in rule.inputs:
        if not port.optional and port.name not in node.inputs:
            allowed = f"{type_name(port.type)}, which {node.op} needs"
            yield _fault(f"{at}.inputs.{port.name}", "nothing", allowed)
    yield from _faults_of_settings(at, node, rule)


def _faults_of_source(
    reading: _Reading, at: str, node: WorkflowNode, port: OperationPort
) -> Iterator[Violation]:
    text = node.inputs[port.name]
    source = source_of(text)
    if port.needs and port.needs not in node.inputs:
        yield _fault(at, text, f"nothing without {port.needs}")
    if port.excludes and port.excludes in node.inputs:
        yield _fault(at, text, f"nothing beside {port.excludes}")
    if source is None:
        yield _fault(at, repr(text), 'another node\'s port ("node.port"), or an input ("$name")')
    elif source.input:
        kind = reading.inputs.get(source.input)
        if kind is None:
            allowed = _list(f"${name}" for name in reading.inputs)
            yield _fault(at, text, f"an input of the workflow: {allowed}")
        elif kind != port.type:
            yield _fault(at, f"{text}, a {type_name(kind)}", _matching(reading, port))
    elif source.node not in reading.places:
        yield _fault(at, text, f"a port of a node: {_list(reading.places)}")
    elif (rule := reading.rule(source.node)) is not None:
        made = rule.output(source.port)
        if made is None:
            allowed = _list(f"{source.node}.{port.name}" for port in rule.outputs)
            yield _fault(at, text, f"what {rule.name} makes: {allowed}")
        elif made.type != port.type:
            yield _fault(at, f"{text}, {type_name(made.type)}", _matching(reading, port))


def _matching(reading: _Reading, port: OperationPort) -> str:
    """What the port takes, with those that are there."""
    offered = [f"${name}" for name, kind in reading.inputs.items() if kind == port.type]
    offered += [
        f"{node.id}.{made.name}"
        for node in reading.spec.nodes
        if (rule := OPERATIONS.get(node.op)) is not None
        for made in rule.outputs
        if made.type == port.type
    ]
    return f"{type_name(port.type)}, as of {_list(offered)}"


def _faults_of_settings(at: str, node: WorkflowNode, rule: OperationRule) -> Iterator[Violation]:
    for name in sorted(node.settings):
        known, value = rule.settings.get(name), value_of(node.settings[name])
        if known is None:
            found = f"a setting that {node.op} does not have"
            yield _fault(f"{at}.settings.{name}", found, _list(rule.settings))
        elif value is None or not known.takes(value):
            shown = repr(value) if value is not None else "nothing"
            yield _fault(f"{at}.settings.{name}", shown, known.allowed)
        elif known.needs and known.needs not in node.inputs and value != known.default:
            yield _fault(f"{at}.settings.{name}", value, f"nothing without inputs.{known.needs}")


# -------------------------------------------------------------------------------- the graph


def _faults_of_graph(reading: _Reading) -> Iterator[Violation]:
    spec, graph = reading.spec, reading.graph
    if graph.cycle:
        at = f"nodes[{reading.places[graph.cycle[0]]}].inputs"
        yield _fault(at, f"the cycle {' -> '.join(graph.cycle)}", "no cycles")
    output = source_of(spec.output)
    if output is None or output.node not in reading.places:
        return
    used = graph.needed_by(output.node)
    read = {name for node in used for name in graph.inputs_of(node)}
    for index, node in enumerate(spec.nodes):
        if node.id not in used and reading.places.get(node.id) == index:
            allowed = f"nodes that lead to the output, {spec.output}"
            yield _fault(f"nodes[{index}]", f"{node.id}, whose output goes nowhere", allowed)
    if graph.cycle:
        return
    missing = graph.missing_without(reading.optional)
    if output.node in missing:
        allowed = f"one that is made without {_list(sorted(reading.optional))}, too"
        yield _fault("output", f"{spec.output}, which needs optional inputs", allowed)
    for index, item in enumerate(spec.inputs):
        if item.name not in read:
            yield _fault(f"inputs[{index}]", f"{item.name}, which no node takes", "inputs in use")
    yield from sizes.faults(spec, graph)
