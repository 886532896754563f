"""What control adds to a request at its door, and what nobody serves of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from control import translate
from control.requests import refusals
from control.scheduler.core import Scheduler
from control.workflows.compiled import workflow_of
from hocket import loras
from hocket.v1 import control_pb2, generation_pb2, types_pb2
from hocket.workflows import sizes
from hocket.workflows.catalogue import OPERATIONS, needed_operations
from hocket.workflows.roles import missing_roles

Served = Mapping[str, generation_pb2.ModelInfo]


def prepared(submit: control_pb2.SubmitRequest, served: Served) -> types_pb2.Failure | None:
    """Fills in what is control's own: branches of guidance, and the shapes of a workflow's nodes.
    Else why no living worker can run the request.
    """
    spec = submit.request.spec
    used = sizes.models_of(submit.workflow, spec.model)
    for name in dict.fromkeys((spec.model, *used)):
        if name not in served:
            return refusals.not_served(name, served)
    if (failure := _missing(submit, served)) is not None:
        return failure
    for node in submit.workflow.nodes:
        for port, operation in needed_operations(node).items():
            model = served[node.model or spec.model]
            if operation not in model.operations:
                return refusals.operation_not_served(spec.workflow, node.id, operation, model, port)
    if (failure := _unknown_lora(spec, served[spec.model])) is not None:
        return failure
    spec.guidance_branches = translate.branches_of(spec, (served[spec.model],))
    submit.ClearField("shapes")
    if not submit.HasField("workflow"):
        return None
    try:
        shapes = sizes.shapes_of(submit.workflow, spec.shape, [served[name] for name in used])
    except ValueError:  # of models whose sizes have no multiple in common, within reason
        return refusals.sizes_not_served(spec.workflow, spec.shape, used)
    for node_id, shape in shapes.items():
        submit.shapes[node_id].CopyFrom(shape)
    return None


def _missing(submit: control_pb2.SubmitRequest, served: Served) -> types_pb2.Failure | None:
    """Weights that a request needs, and nobody has."""
    own = submit.request.spec.model
    nodes = [node for node in submit.workflow.nodes if OPERATIONS[node.op].part]
    for name in sizes.models_of(submit.workflow, own) or (own,):
        missing = missing_roles(served[name])
        if missing and submit.HasField("workflow"):
            called = {OPERATIONS[node.op].part for node in nodes if (node.model or own) == name}
            missing = tuple(role for role in missing if role in called)
        if missing:
            return refusals.roles_missing(served[name], missing)
    return None


def taught(scheduler: Scheduler, submits: Iterable[control_pb2.SubmitRequest]) -> Scheduler:
    """It, once it knows the workflows of these requests."""
    scheduler.learn(*[workflow_of(submit) for submit in submits if submit.HasField("workflow")])
    return scheduler


def _unknown_lora(
    spec: types_pb2.GenerationSpec, model: generation_pb2.ModelInfo
) -> types_pb2.Failure | None:
    wanted = (lora.name for lora in map(loras.parsed, spec.loras) if lora is not None)
    unknown = next((name for name in wanted if name not in model.adapters), None)
    return None if unknown is None else refusals.lora_not_served(unknown, model)
