"""A workflow's graph, for terminals and as Mermaid text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rich.text import Text
from rich.tree import Tree

from hocket.v1.workflows_pb2 import WorkflowNode, WorkflowSpec
from hocket.workflows.catalogue import OPERATIONS
from hocket.workflows.catalogue import port_type_name as type_name
from hocket.workflows.content import source_of, value_of


def drawn(spec: WorkflowSpec, notes: Mapping[str, str] = MappingProxyType({})) -> Tree:
    """From the output back to the inputs; what was drawn above is named only. `notes` are written
    beside nodes, by their ids. Of a spec that has no faults.
    """
    nodes = {node.id: node for node in spec.nodes}
    optional = {item.name for item in spec.inputs if item.optional}
    seen: set[str] = set()
    tree = Tree(Text(spec.output, style="bold"))
    todo = [(tree, "", spec.output)]
    while todo:
        branch, port, text = todo.pop()
        source = source_of(text)
        if source is None or source.input:
            line = Text(f"{port}: {text}", style="green")
            if source is not None and source.input in optional:
                line.append(" (optional)")
            branch.add(line)
            continue
        node = nodes[source.node]
        told = _line(node, port)
        if node.id in seen:
            told.append("  (above)", style="dim")
            branch.add(told)
            continue
        seen.add(node.id)
        if node.id in notes:
            told.append(f"  {notes[node.id]}", style="green")
        below = branch.add(told)
        todo += [(below, name, node.inputs[name]) for name in reversed(_ports(node))]
    return tree


def mermaid(spec: WorkflowSpec) -> str:
    """The graph as Mermaid's flowchart, data flowing down. Of a spec that has no faults."""
    lines = ["flowchart TD"]
    lines += [f'  in_{_word(item.name)}(["{item.name}"])' for item in spec.inputs]
    for node in spec.nodes:
        settings = "".join(f"<br/>{text}" for text in _settings(node))
        model = f"<br/>{node.model}" if node.model else ""
        lines.append(f'  {_word(node.id)}["{node.id}<br/>{node.op}{model}{settings}"]')
    for node in spec.nodes:
        rule = OPERATIONS[node.op]
        for name in _ports(node):
            source, port = source_of(node.inputs[name]), rule.input(name)
            assert source is not None and port is not None, "a spec without faults"
            start = f"in_{_word(source.input)}" if source.input else _word(source.node)
            lines.append(f"  {start} -->|{type_name(port.type)}| {_word(node.id)}")
    output = source_of(spec.output)
    assert output is not None, "a spec without faults"
    lines.append(f"  {_word(output.node)} --> result([result])")
    return "\n".join(lines) + "\n"


def _line(node: WorkflowNode, port: str) -> Text:
    told = Text(f"{port}: " if port else "")
    told.append(node.id, style="bold cyan")
    told.append(f"  {node.op}")
    part = OPERATIONS[node.op].part
    if part:
        told.append(f" [{node.model + ' ' if node.model else ''}{part}]", style="magenta")
    for text in _settings(node):
        told.append(f" {text}", style="yellow")
    return told


def _ports(node: WorkflowNode) -> list[str]:
    return [port.name for port in OPERATIONS[node.op].inputs if port.name in node.inputs]


def _settings(node: WorkflowNode) -> list[str]:
    return [f"{name}={value_of(value)}" for name, value in sorted(node.settings.items())]


def _word(name: str) -> str:
    """An id that Mermaid takes: none of its own words."""
    return f"n_{name.replace('-', '_')}"
