"""Of what size each node works, and of how many channels pixels are.

A node's size is the request's times its `scale`, to the nearest multiple that its model takes. What
is passed on has the size of its maker: only operations that change sizes may take another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from hocket import free_sizes
from hocket.errors import Violation
from hocket.v1.generation_pb2 import ModelInfo
from hocket.v1.types_pb2 import Shape
from hocket.v1.workflows_pb2 import WorkflowNode, WorkflowSpec
from hocket.workflows.catalogue import LATENTS, OPERATIONS, PIXELS, OperationPort
from hocket.workflows.content import scale_of, source_of
from hocket.workflows.graph import WorkflowGraph


def multiple_of(model: ModelInfo) -> int:
    """What a model's widths and heights are multiples of, as far as it tells; at least 1."""
    if free_sizes.are_free(model):
        return model.size_multiple
    return max(1, math.gcd(*(side for s in model.shapes for side in (s.width, s.height))))


def models_of(spec: WorkflowSpec, asked: str) -> tuple[str, ...]:
    """Models whose weights a workflow's nodes run with, of a request for the model `asked`."""
    weighty = [node for node in spec.nodes if node.op in OPERATIONS and OPERATIONS[node.op].part]
    return tuple(dict.fromkeys(node.model or asked for node in weighty))


def scaled(shape: Shape, scale: float, multiple: int) -> Shape:
    """A request's shape as a node of that scale has it. Halves round up."""
    made = Shape()
    made.CopyFrom(shape)
    if scale != 1.0:
        made.width = _side(shape.width, scale, multiple)
        made.height = _side(shape.height, scale, multiple)
    return made


def _side(pixels: int, scale: float, multiple: int) -> int:
    return max(1, math.floor(pixels * scale / multiple + 0.5)) * multiple


def shapes_of(spec: WorkflowSpec, shape: Shape, models: Iterable[ModelInfo]) -> Mapping[str, Shape]:
    """The shape of what each node makes, of a request of that shape; `models`: those that its nodes
    run with. All nodes go by one multiple, so that those of one scale have one size. Raises
    ValueError where that is none that a shape can have.
    """
    multiple = math.lcm(*(multiple_of(model) for model in models))
    return {node.id: scaled(shape, scale_of(node), multiple) for node in spec.nodes}


def faults(spec: WorkflowSpec, graph: WorkflowGraph) -> Iterator[Violation]:
    """Ports that are fed what has another size or other channels, and an output that has not the
    request's size. Of a spec without cycles."""
    grey = _grey(graph)
    seen: set[str] = set()
    for index, node in enumerate(spec.nodes):
        rule = OPERATIONS.get(node.op)
        if rule is None or node.id in seen:
            continue
        seen.add(node.id)
        for port, maker in _fed(node, rule.inputs, graph):
            at = f"nodes[{index}].inputs.{port.name}"
            if port.type == PIXELS and not rule.keeps_grey and (maker.id in grey) != port.grey:
                what = "a mask" if maker.id in grey else "a picture"
                wanted = "a mask, as load_mask makes it" if port.grey else "a picture"
                yield Violation(at, f"found {what}, of {maker.id}; allowed: {wanted}")
            theirs, ours = scale_of(maker), scale_of(node)
            if theirs != ours and not rule.changes_size:
                told = f"found scale {theirs:g} of {maker.id}; allowed: {ours:g}, the node's own"
                yield Violation(at, f"{told} (put a resize between)")
    output = source_of(spec.output)
    last = graph.nodes.get(output.node) if output is not None else None
    if last is not None and (scale := scale_of(last)) != 1.0:
        allowed = "1: a request's shape is that of its result"
        yield Violation("output", f"found scale {scale:g} of {last.id}; allowed: {allowed}")


def _fed(
    node: WorkflowNode, ports: Iterable[OperationPort], graph: WorkflowGraph
) -> Iterator[tuple[OperationPort, WorkflowNode]]:
    """Ports that take pixels or latents, each with the node that makes them."""
    for port in ports:
        source = source_of(node.inputs[port.name]) if port.name in node.inputs else None
        maker = graph.nodes.get(source.node) if source is not None else None
        if maker is not None and source is not None and port.type in (PIXELS, LATENTS):
            rule = OPERATIONS.get(maker.op)
            made = rule.output(source.port) if rule is not None else None
            if made is not None and made.type == port.type:
                yield port, maker


def _grey(graph: WorkflowGraph) -> frozenset[str]:
    """Nodes whose pixels have one channel."""
    found: set[str] = set()
    for name in graph.order:
        rule = OPERATIONS.get(graph.nodes[name].op)
        if rule is None:
            continue
        makes = any(port.grey for port in rule.outputs)
        if makes or (rule.keeps_grey and any(maker in found for maker in graph.makers[name])):
            found.add(name)
    return frozenset(found)
