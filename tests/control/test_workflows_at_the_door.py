"""What control makes of workflows before it promises anything."""

from __future__ import annotations

import pytest

from control import translate
from control.scheduler.books.catalogue import WORKFLOWS_MAX, UnknownWorkflow
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.workflows.admitting import prepared, taught
from control.workflows.compiled import compiled, passes_of, steps_at, steps_total
from hocket.v1 import control_pb2, generation_pb2, types_pb2
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.content import digest_of
from hocket.workflows.shipped import shipped

OPERATIONS = ("encode_prompt", "encode_image", "denoise", "decode")
PROFILE = "model,gpu,node,width,height,frames,degree,batch,call_us\nm,g,dit,64,64,1,1,1,1000\n"


def two_passes(name: str = "two-pass", strength: float = 0.5) -> WorkflowSpec:
    spec = WorkflowSpec()
    spec.CopyFrom(shipped()["two-pass"])
    spec.name = name
    for node in spec.nodes:
        if "strength" in node.settings:
            node.settings["strength"].number_value = strength
    spec.digest = digest_of(spec)
    return spec


def wish(spec: WorkflowSpec | None = None, side: int = 128) -> control_pb2.SubmitRequest:
    submit = control_pb2.SubmitRequest(request_id="01j")
    submit.request.spec.CopyFrom(
        types_pb2.GenerationSpec(
            model="m", prompt="a fox", steps=20, shape=types_pb2.Shape(width=side, height=side)
        )
    )
    if spec is not None:
        submit.workflow.CopyFrom(spec)
    return submit


def model(name: str = "m", multiple: int = 16) -> generation_pb2.ModelInfo:
    return generation_pb2.ModelInfo(name=name, operations=OPERATIONS, size_multiple=multiple)


def test_one_content_is_one_workflow_in_whatever_order_its_nodes_stand() -> None:
    spec, other = two_passes(), two_passes()
    nodes = list(other.nodes)
    del other.nodes[:]
    other.nodes.extend(reversed(nodes))
    assert digest_of(other) == spec.digest
    assert compiled(spec).workflow == compiled(other).workflow


def test_what_is_left_of_a_workflow_is_another_one() -> None:
    spec, less = two_passes(), two_passes()
    for node in less.nodes:
        node.inputs.pop("negative_prompt", None)
    assert compiled(spec).workflow.name != compiled(less).workflow.name
    assert compiled(less).workflow.name.startswith(f"two-pass@{spec.digest[:16]}/")


def test_a_batch_of_more_workflows_than_are_kept_is_forecast_whole() -> None:
    scheduler = Scheduler(Settings(), Profile.from_csv(PROFILE))
    submits = []
    for number in range(WORKFLOWS_MAX + 44):
        submit = wish(two_passes(f"w{number}", 0.1 + number / 1000))
        assert prepared(submit, {"m": model()}) is None
        submits.append(submit)
    requests = [translate.to_request(submit, 0) for submit in submits]
    taught(scheduler, submits)
    assert len(scheduler.forecast(requests, 0)) == len(submits)
    taught(scheduler, submits[:1])  # the others are not in this batch: some are forgotten
    with pytest.raises(UnknownWorkflow):
        scheduler.forecast(requests, 0)


def test_passes_have_their_own_steps_and_shapes() -> None:
    submit = wish(two_passes())
    assert prepared(submit, {"m": model()}) is None
    first, second = passes_of(submit)
    assert (first.node, first.steps, first.shape.width) == ("first", 20, 64)
    assert (second.node, second.steps, second.shape.width) == ("denoise", 10, 128)
    assert steps_total(submit) == 30 and steps_at(submit, "enlarge") == 0
    assert passes_of(wish()) == () and steps_total(wish()) == 20


def test_what_nobody_serves_is_refused_by_name() -> None:
    bare = model()
    bare.operations.remove("encode_image")
    refused = prepared(wish(two_passes()), {"m": bare})
    assert refused is not None and refused.reason == "WORKFLOW_NOT_SERVED"
    assert refused.metadata["node"] == "encode" and "encode_image" in refused.message
    assert prepared(wish(), {"m": bare}) is None
    missing = prepared(wish(), {"n": bare})
    assert missing is not None and missing.reason == "MODEL_NOT_SERVED"


def test_sizes_that_no_models_have_in_common_are_refused() -> None:
    spec = two_passes()
    for name, node in zip(
        ("a", "b", "c"), [n for n in spec.nodes if n.op != "resize"], strict=False
    ):
        node.model = name
    served = {
        "m": model(),
        "a": model("a", 65_521),
        "b": model("b", 65_519),
        "c": model("c", 65_497),
    }
    refused = prepared(wish(spec), served)
    assert refused is not None and "a, b, c" in refused.message
