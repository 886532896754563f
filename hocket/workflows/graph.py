"""Who needs whom in a workflow; also of one that has faults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hocket.v1.workflows_pb2 import WorkflowNode, WorkflowSpec
from hocket.workflows.catalogue import OPERATIONS
from hocket.workflows.content import source_of


@dataclass(frozen=True)
class WorkflowGraph:
    """Nodes by id, each with the nodes that make what it takes."""

    nodes: Mapping[str, WorkflowNode]
    makers: Mapping[str, tuple[str, ...]]
    order: tuple[str, ...]  # each behind its makers; without those on a cycle and behind it
    cycle: tuple[str, ...]  # one, back to its first node; empty: there is none

    def inputs_of(self, node: str) -> tuple[str, ...]:
        """Inputs of the workflow that a node takes itself."""
        found = map(source_of, self.nodes[node].inputs.values())
        return tuple(source.input for source in found if source is not None and source.input)

    def needed_by(self, node: str) -> frozenset[str]:
        """The node, and all that it needs, directly or not."""
        found, todo = {node}, [node]
        while todo:
            fresh = set(self.makers.get(todo.pop(), ())) - found
            found |= fresh
            todo += fresh
        return frozenset(found)

    def missing_without(self, absent: Collection[str]) -> frozenset[str]:
        """Nodes that cannot run where these inputs of the workflow are not given: what feeds a
        port that they must have is missing."""
        missing: set[str] = set()
        for name in self.order:
            node = self.nodes[name]
            rule = OPERATIONS.get(node.op)
            must = {p.name for p in rule.inputs if not p.optional} if rule is not None else set()
            for port, text in node.inputs.items():
                source = source_of(text)
                if source is None or port not in must:
                    continue
                if source.input in absent or source.node in missing:
                    missing.add(name)
        return frozenset(missing)


def graph_of(spec: WorkflowSpec) -> WorkflowGraph:
    """The graph of a spec. Of nodes with the same id the first counts; what names no node is left
    out."""
    nodes: dict[str, WorkflowNode] = {}
    for node in spec.nodes:
        nodes.setdefault(node.id, node)
    makers: dict[str, tuple[str, ...]] = {}
    for name, node in nodes.items():
        sources = (source_of(node.inputs[port]) for port in sorted(node.inputs))
        named = (source.node for source in sources if source is not None and source.node)
        makers[name] = tuple(dict.fromkeys(maker for maker in named if maker in nodes))
    order = _order(makers)
    return WorkflowGraph(nodes, makers, order, _cycle(makers, set(makers).difference(order)))


def pruned(spec: WorkflowSpec, given: Collection[str]) -> WorkflowSpec:
    """The workflow as it is run with these inputs: without optional ones that were not given, and
    without the nodes that need them. Of a spec that has no faults."""
    absent = {item.name for item in spec.inputs if item.name not in given}
    graph = graph_of(spec)
    missing = graph.missing_without(absent)
    left = WorkflowSpec()
    left.CopyFrom(spec)
    del left.inputs[:], left.nodes[:]
    left.inputs.extend(item for item in spec.inputs if item.name not in absent)
    for node in spec.nodes:
        if node.id in missing:
            continue
        kept = left.nodes.add()
        kept.CopyFrom(node)
        for port, text in node.inputs.items():
            source = source_of(text)
            if source is not None and (source.input in absent or source.node in missing):
                del kept.inputs[port]
    return _without_idle_nodes(left)


def _without_idle_nodes(spec: WorkflowSpec) -> WorkflowSpec:
    output = source_of(spec.output)
    assert output is not None, "a workflow without faults has an output"
    used = graph_of(spec).needed_by(output.node)
    nodes = [node for node in spec.nodes if node.id in used]
    if len(nodes) < len(spec.nodes):
        left = WorkflowSpec()
        left.CopyFrom(spec)
        del left.nodes[:]
        left.nodes.extend(nodes)
        return left
    return spec


def _order(makers: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    done: dict[str, None] = {}
    while fresh := [n for n in makers if n not in done and all(m in done for m in makers[n])]:
        done.update(dict.fromkeys(fresh))
    return tuple(done)


def _cycle(makers: Mapping[str, tuple[str, ...]], stuck: Collection[str]) -> tuple[str, ...]:
    """A cycle among nodes each of which has a maker among them, in the direction of the data."""
    if not stuck:
        return ()
    path = [next(name for name in makers if name in stuck)]
    while (before := next(m for m in makers[path[-1]] if m in stuck)) not in path:
        path.append(before)
    ring = path[path.index(before) :][::-1]
    start = ring.index(next(name for name in makers if name in ring))
    return (*ring[start:], *ring[:start], ring[start])
