"""What a worker is told of a call of a workflow's node, for one request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from control.scheduler import values
from control.workflows.compiled import CompiledWorkflow, compiled
from hocket.messaging.subjects import input_object
from hocket.v1 import control_pb2, generation_pb2, mesh_pb2, types_pb2, workflows_pb2
from hocket.workflows.catalogue import OPERATIONS, TEXT, OperationPort, SettingValue
from hocket.workflows.content import PROMPTS, source_of


def node_call(
    submit: control_pb2.SubmitRequest,
    node: str,
    member: values.Member,
    store_address: Callable[[str], str],
) -> mesh_pb2.NodeCall:
    """The call of `node` for a request, from the artifacts that the scheduler found for it."""
    known, request = compiled(submit.workflow), submit.request
    said, rule = known.nodes[node], OPERATIONS[known.nodes[node].op]
    call = mesh_pb2.NodeCall(
        op=rule.name,
        model=(said.model or request.spec.model) if rule.part else "",
        shape=submit.shapes[node],
        inputs=_inputs(known, said, request, member, store_address),
        outputs=[f"{node}.{port.name}" for port in rule.outputs],
    )
    _set(call, known.settings[node])
    return call


def _set(call: mesh_pb2.NodeCall, settings: Mapping[str, SettingValue]) -> None:
    for name, value in settings.items():
        if isinstance(value, str):
            call.settings[name].string_value = value
        else:
            call.settings[name].number_value = value


def _inputs(
    known: CompiledWorkflow,
    node: workflows_pb2.WorkflowNode,
    request: generation_pb2.GenerateRequest,
    member: values.Member,
    store_address: Callable[[str], str],
) -> Iterator[mesh_pb2.NodeInput]:
    """In the order of the operation's ports. A stepped node behind its first step goes on from its
    own latents alone.
    """
    found = {each.artifact: each for each in member.inputs}
    own = known.workflow.node[node.id].outputs[0].name
    if own in found:
        yield _artifact(own.partition(".")[2], found[own], store_address)
        return
    for port in OPERATIONS[node.op].inputs:
        source = source_of(node.inputs[port.name]) if port.name in node.inputs else None
        if source is None:
            continue
        if source.node:
            yield _artifact(port.name, found[f"{source.node}.{source.port}"], store_address)
        else:
            brought = _brought(port, source.input, request)
            if brought is not None:
                yield brought


def _artifact(
    port: str, each: values.Input, store_address: Callable[[str], str]
) -> mesh_pb2.NodeInput:
    return mesh_pb2.NodeInput(
        port=port,
        artifact=each.artifact,
        version=each.version,
        holders=[
            types_pb2.LatentHolder(
                worker=worker, steps_done=each.version, store_address=store_address(worker)
            )
            for worker in each.holders
        ],
    )


def _brought(
    port: OperationPort, name: str, request: generation_pb2.GenerateRequest
) -> mesh_pb2.NodeInput | None:
    """What the request brought; None where it left that out."""
    spec = request.spec
    if port.type == TEXT and name in PROMPTS:
        text = spec.prompt if name == PROMPTS[0] else spec.negative_prompt
        return mesh_pb2.NodeInput(port=port.name, text=text)
    if name not in spec.inputs:
        return None
    stored = input_object(request.tenant, spec.inputs[name])
    return mesh_pb2.NodeInput(port=port.name, object_name=stored)
