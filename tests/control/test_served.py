"""What nobody serves of a request, and what a model is whose workers differ."""

from __future__ import annotations

import pytest

from control.entrance.door import check_submit
from control.scaling.seen_models import ModelsSeen
from control.workflows.admitting import prepared
from hocket.v1 import control_pb2, mesh_pb2
from hocket.v1.generation_pb2 import ModelInfo
from hocket.workflows.roles import together
from hocket.workflows.shipped import shipped
from tests.control.made import promised

CHAIN = ("encode_prompt", "encode_image", "denoise", "decode")


def submit_of(workflow: str = "", *loras: str) -> control_pb2.SubmitRequest:
    submit = promised("r").submit
    submit.request.spec.loras.extend(loras)
    if workflow:
        submit.workflow.CopyFrom(shipped()[workflow])
        submit.request.spec.workflow = workflow
    return submit


def model(*operations: str, adapters: tuple[str, ...] = ()) -> ModelInfo:
    return ModelInfo(name="m", operations=[*CHAIN, *operations], adapters=adapters)


@pytest.mark.parametrize(
    ("workflow", "port"),
    [("inpaint", "mask"), ("edit", "reference"), ("control", "control")],
)
def test_a_port_that_the_model_does_not_have_is_refused(workflow: str, port: str) -> None:
    submit = submit_of(workflow)
    failure = prepared(submit, {"m": model()})
    assert failure is not None and failure.reason == "WORKFLOW_NOT_SERVED"
    named = {"node": "denoise", "port": port, "operation": f"denoise.{port}", "model": "m"}
    assert dict(failure.metadata) == named
    assert prepared(submit, {"m": model(f"denoise.{port}")}) is None


def test_an_adapter_that_the_model_does_not_have_is_refused() -> None:
    for submit in (submit_of("", "style:0.5", "pixel"), submit_of("img2img", "style", "pixel")):
        failure = prepared(submit, {"m": model(adapters=("style",))})
        assert failure is not None and failure.reason == "LORA_NOT_SERVED"
        assert dict(failure.metadata) == {"lora": "pixel", "model": "m"}
        assert "served: style" in failure.message
        assert prepared(submit, {"m": model(adapters=("pixel", "style"))}) is None
        assert not check_submit(submit)
    (wrong,) = check_submit(submit_of("", "style", "pixel:9"))
    assert wrong.field == "request.spec.loras[1]" and "-4 to 4" in wrong.description


def test_what_one_of_a_models_workers_lacks_is_not_offered() -> None:
    rich = model("denoise.mask", "denoise.control", adapters=("detail", "style"))
    bare, text = model("denoise.mask", adapters=("style",)), ModelInfo(name="m")
    text.operations.append("encode_prompt")
    text.adapters.append("style")
    found = together([rich, bare, text])["m"]
    assert set(found.operations) == {*CHAIN, "denoise.mask"} and list(found.adapters) == ["style"]
    assert together([rich, rich])["m"] is rich
    beats = [mesh_pb2.Heartbeat(worker=w, models=[m]) for w, m in (("a", rich), ("b", bare))]
    seen = ModelsSeen(kept_us=1)
    seen.see(beats, 0)
    changes = seen.changes
    seen.see(beats, 0)
    assert seen.changes == changes, "the same workers are no news"
    (listed,) = seen.listed()
    assert list(listed.adapters) == ["style"] and listed.workers == 2
