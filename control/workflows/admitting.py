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

Served = Mapping[str, generation_pb2.ModelInfo]


def unserved(submit: control_pb2.SubmitRequest, served: Served) -> types_pb2.Failure | None:
    """Why no living worker can run a request; None where they can."""
    spec = submit.request.spec
    for name in _models(submit):
        if name not in served:
            return refusals.not_served(name, served)
    for node in submit.workflow.nodes:
        for port, operation in needed_operations(node).items():
            model = served[node.model or spec.model]
            if operation not in model.operations:
                return refusals.operation_not_served(spec.workflow, node.id, operation, model, port)
    return _unknown_lora(spec, served[spec.model])


def complete(submit: control_pb2.SubmitRequest, served: Served) -> None:
    """Fills in what is control's own: branches of guidance, and the shapes of a workflow's nodes.
    All its models are served.
    """
    spec = submit.request.spec
    spec.guidance_branches = translate.branches_of(spec, (served[spec.model],))
    submit.ClearField("shapes")
    if submit.HasField("workflow"):
        models = [served[name] for name in _models(submit)]
        for node, shape in sizes.shapes_of(submit.workflow, spec.shape, models).items():
            submit.shapes[node].CopyFrom(shape)


def taught(scheduler: Scheduler, submits: Iterable[control_pb2.SubmitRequest]) -> Scheduler:
    """It, once it knows the workflows of these requests."""
    for submit in submits:
        if submit.HasField("workflow"):
            scheduler.learn(workflow_of(submit))
    return scheduler


def _unknown_lora(
    spec: types_pb2.GenerationSpec, model: generation_pb2.ModelInfo
) -> types_pb2.Failure | None:
    wanted = (lora.name for lora in map(loras.parsed, spec.loras) if lora is not None)
    unknown = next((name for name in wanted if name not in model.adapters), None)
    return None if unknown is None else refusals.lora_not_served(unknown, model)


def _models(submit: control_pb2.SubmitRequest) -> list[str]:
    """Models whose weights a request needs, its own first."""
    named = [node.model for node in submit.workflow.nodes if OPERATIONS[node.op].part]
    return list(dict.fromkeys(name or submit.request.spec.model for name in ("", *named)))
