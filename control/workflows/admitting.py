"""What control adds to a request at its door, and what nobody serves of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from control import translate
from control.requests import refusals
from control.scheduler.core import Scheduler
from control.workflows.compiled import models_of, workflow_of
from hocket.v1 import control_pb2, generation_pb2, types_pb2
from hocket.workflows import sizes
from hocket.workflows.catalogue import OPERATIONS

Served = Mapping[str, generation_pb2.ModelInfo]


def unserved(submit: control_pb2.SubmitRequest, served: Served) -> types_pb2.Failure | None:
    """Why no living worker can run a request; None where they can."""
    spec = submit.request.spec
    for name in models_of(submit):
        if name not in served:
            return refusals.not_served(name, served)
    for node in submit.workflow.nodes:
        if OPERATIONS[node.op].part:
            model = served[node.model or spec.model]
            if node.op not in model.operations:
                return refusals.operation_not_served(spec.workflow, node.id, node.op, model)
    return None


def complete(submit: control_pb2.SubmitRequest, served: Served) -> None:
    """Fills in what is control's own: branches of guidance, and the shapes of a workflow's nodes.
    All its models are served.
    """
    spec = submit.request.spec
    spec.guidance_branches = translate.branches_of(spec, (served[spec.model],))
    submit.ClearField("shapes")
    if submit.HasField("workflow"):
        models = [served[name] for name in models_of(submit)]
        for node, shape in sizes.shapes_of(submit.workflow, spec.shape, models).items():
            submit.shapes[node].CopyFrom(shape)


def taught(scheduler: Scheduler, submits: Iterable[control_pb2.SubmitRequest]) -> Scheduler:
    """It, once it knows the workflows of these requests."""
    for submit in submits:
        if submit.HasField("workflow"):
            scheduler.learn(workflow_of(submit))
    return scheduler
