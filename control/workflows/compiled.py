"""A registered workflow as the scheduler has it: nodes with parts, artifacts and passes.

The scheduler's names of operations are those of profiles: what the plain chain's nodes are called
there, and else the operation's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from control.scheduler import values
from control.scheduler.workflow import (
    CHAIN,
    Artifact,
    ArtifactType,
    Degrees,
    Node,
    NodeKind,
    Workflow,
)
from hocket.strength import steps_to_run
from hocket.v1 import control_pb2, workflows_pb2
from hocket.workflows import sizes
from hocket.workflows.catalogue import (
    EMBEDDINGS,
    FILE,
    LATENTS,
    OPERATIONS,
    PIXELS,
    OperationRule,
    SettingValue,
)
from hocket.workflows.content import (
    DIGEST_SHOWN,
    digest_of,
    named,
    scale_of,
    settings_of,
    source_of,
)

_COMPILED_MAX = 256
_TYPES = {
    EMBEDDINGS: ArtifactType.EMBEDDINGS,
    LATENTS: ArtifactType.LATENTS,
    PIXELS: ArtifactType.PIXELS,
    FILE: ArtifactType.MEDIA,
}
_PROFILE_NAMES = {
    "encode_prompt": values.TEXT,
    "denoise": values.DIT,
    "decode": values.VAE,
}


@dataclass(frozen=True)
class CompiledWorkflow:
    """A workflow, and what its nodes say beyond what the scheduler knows of them."""

    workflow: Workflow
    nodes: Mapping[str, workflows_pb2.WorkflowNode]
    settings: Mapping[str, Mapping[str, SettingValue]]  # by node, defaults filled in


def profile_name(operation: str) -> str:
    """What profiles, latency models and logs call an operation."""
    return _PROFILE_NAMES.get(operation, operation)


def compiled(spec: workflows_pb2.WorkflowSpec) -> CompiledWorkflow:
    """Of a workflow without faults, its digest set. Remembered by content."""
    return _compiled(spec.SerializeToString(deterministic=True))


@lru_cache(maxsize=_COMPILED_MAX)
def _compiled(content: bytes) -> CompiledWorkflow:
    spec = workflows_pb2.WorkflowSpec.FromString(content)
    # By their ids, as in the digest: one content, one workflow, in whatever order it was written.
    ordered = sorted(spec.nodes, key=lambda node: node.id)
    nodes = tuple([_node(node, OPERATIONS[node.op]) for node in ordered])
    return CompiledWorkflow(
        Workflow(_name(spec), nodes),
        MappingProxyType({node.id: node for node in spec.nodes}),
        MappingProxyType({node.id: MappingProxyType(settings_of(node)) for node in spec.nodes}),
    )


def _name(spec: workflows_pb2.WorkflowSpec) -> str:
    """Of what is left of it: a request that leaves out optional inputs runs fewer nodes."""
    left = digest_of(spec)
    return named(spec) if left == spec.digest else f"{named(spec)}/{left[:DIGEST_SHOWN]}"


def _node(node: workflows_pb2.WorkflowNode, rule: OperationRule) -> Node:
    sources = [
        source_of(node.inputs[port.name]) for port in rule.inputs if port.name in node.inputs
    ]
    return Node(
        node.id,
        rule.part,
        NodeKind.STEPPED if rule.stepped else NodeKind.ONCE,
        tuple([f"{source.node}.{source.port}" for source in sources if source and source.node]),
        tuple([Artifact(f"{node.id}.{port.name}", _TYPES[port.type]) for port in rule.outputs]),
        Degrees.OFFERED if rule.stepped else Degrees.ONE,
        op=profile_name(rule.name),
        model=node.model,
        scale=scale_of(node),
    )


def workflow_of(submit: control_pb2.SubmitRequest) -> Workflow:
    """Of a request; the plain chain unless it brought another."""
    return compiled(submit.workflow).workflow if submit.HasField("workflow") else CHAIN


def models_of(submit: control_pb2.SubmitRequest) -> list[str]:
    """Models whose weights a request needs, its own first."""
    own = submit.request.spec.model
    return list(dict.fromkeys((own, *sizes.models_of(submit.workflow, own))))


def steps_at(submit: control_pb2.SubmitRequest, node: str) -> int:
    """Steps that a node runs for a request; 0 where it is no stepped one."""
    if not submit.HasField("workflow"):
        return submit.request.spec.steps if node == values.DIT else 0
    known = compiled(submit.workflow)
    if node not in known.workflow.steppeds:
        return 0
    settings = known.settings[node]
    steps = int(settings["steps"]) or submit.request.spec.steps
    if "latents" not in known.nodes[node].inputs:
        return steps
    return steps_to_run(steps, float(settings["strength"]))


def steps_total(submit: control_pb2.SubmitRequest) -> int:
    """Steps of all stepped nodes."""
    return sum(steps_at(submit, node) for node in workflow_of(submit).steppeds)


def passes_of(submit: control_pb2.SubmitRequest) -> tuple[values.Pass, ...]:
    """What the stepped nodes of a request's own workflow run; none for the plain chain."""
    if not submit.HasField("workflow"):
        return ()
    known, asked = compiled(submit.workflow), submit.request.spec
    passes = []
    for name in known.workflow.steppeds:
        node, settings, shape = known.nodes[name], known.settings[name], submit.shapes[name]
        # Of another guidance, or another model, nobody has worked out the branches: one worker
        # makes both, which is right for every one of them.
        own = "guidance_scale" in settings or node.model not in ("", asked.model)
        passes.append(
            values.Pass(
                node=name,
                model=node.model or asked.model,
                shape=values.Shape(
                    width=shape.width, height=shape.height, frames=max(1, shape.frames)
                ),
                steps=steps_at(submit, name),
                branches=1 if own else max(1, asked.guidance_branches),
            )
        )
    return tuple(passes)
