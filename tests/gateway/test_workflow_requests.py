"""What a request has to bring for its workflow, and how workflows are found by their names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.validation import completed
from gateway.workflows.names import WantedWorkflow, WorkflowNames
from hocket.client import request
from hocket.clock import ManualClock
from hocket.errors import InvalidRequest, NotReady, Refused
from hocket.v1.generation_pb2 import GenerateRequest, ModelInfo
from hocket.v1.types_pb2 import Shape
from hocket.v1.workflows_pb2 import GetWorkflowResponse, ListWorkflowsResponse, WorkflowSpec
from hocket.workflows.content import digest_of, named
from hocket.workflows.shipped import shipped
from tests.gateway.peer import EMOJI
from tests.gateway.test_validation import VIDEO

FILE = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
SMALL = ModelInfo()
SMALL.CopyFrom(EMOJI)
SMALL.name, SMALL.guidance_kind = "small", "cfg"
SMALL.operations.extend(["encode_prompt", "denoise", "decode"])
PLAIN = ModelInfo()
PLAIN.CopyFrom(EMOJI)
PLAIN.name, PLAIN.adapters[:] = "plain", ["style"]
PLAIN.operations.extend(["encode_prompt", "denoise", "decode", "encode_image", "denoise.loras"])
MODELS = (EMOJI, VIDEO, SMALL, PLAIN)


def of(name: str, change: Callable[[WorkflowSpec], object] | None = None) -> WantedWorkflow:
    spec = WorkflowSpec()
    spec.CopyFrom(shipped()[name])
    if change is not None:
        change(spec)
    spec.digest = digest_of(spec)
    return WantedWorkflow(spec)


def wrong(
    wanted: WantedWorkflow, absent: tuple[str, ...] = (), **options: object
) -> dict[str, str]:
    asked = request("a red fox", **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        completed(asked, MODELS, wanted, absent)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_a_request_that_brings_what_it_has_to() -> None:
    for wanted, inputs in (
        (of("two-pass"), {}),
        (of("img2img"), {"image": FILE}),
        (of("inpaint"), {"image": FILE, "mask": OTHER}),
    ):
        whole = completed(request("a red fox", inputs=inputs), MODELS, wanted).spec
        assert wanted.spec is not None and whole.workflow == named(wanted.spec)
        assert (whole.model, whole.steps, whole.media_type) == ("emoji", 20, "image/png")
        assert dict(whole.inputs) == inputs


def test_an_optional_port_that_is_left_open_needs_nothing_of_the_model() -> None:
    def optional(spec: WorkflowSpec) -> None:
        spec.inputs[3].optional = True

    wanted, inputs = of("inpaint", optional), {"image": FILE}
    whole = completed(
        request("a red fox", model="plain", inputs=inputs, loras=["style:0.5"]), MODELS, wanted
    )
    assert list(whole.spec.loras) == ["style:0.5"]
    with pytest.raises(InvalidRequest, match="mask of node denoise"):
        completed(
            request("a red fox", model="plain", inputs=inputs | {"mask": FILE}), MODELS, wanted
        )


def test_of_too_many_adapters_the_first_beyond_is_told() -> None:
    found = wrong(WantedWorkflow(), loras=[f"a{number}" for number in range(20)])
    assert list(found) == [f"spec.loras[{number}]" for number in range(9)]
    assert "at most 8" in found["spec.loras[8]"]


def _model(name: str, node: int = 1) -> Callable[[WorkflowSpec], object]:
    return lambda spec: setattr(spec.nodes[node], "model", name)


def _number(setting: str, value: float) -> Callable[[WorkflowSpec], object]:
    return lambda spec: setattr(spec.nodes[1].settings[setting], "number_value", value)


def _three_quarters(spec: WorkflowSpec) -> None:
    for node in spec.nodes[1:3]:
        node.settings["scale"].number_value = 0.75


def _no_negative_prompt(spec: WorkflowSpec) -> None:
    del spec.inputs[1], spec.nodes[0].inputs["negative_prompt"]


def _optional_image(spec: WorkflowSpec) -> None:
    spec.inputs[2].optional = True


def _denoised_by_emoji(spec: WorkflowSpec) -> None:
    for node in spec.nodes:
        node.model = "emoji" if node.op == "denoise" else ""


@pytest.mark.parametrize(
    ("wanted", "options", "field", "told"),
    [
        (of("img2img"), {}, "spec.inputs[image]", "found nothing; allowed: an uploaded file"),
        (
            of("img2img"),
            {"inputs": {"pose": FILE}},
            "spec.inputs[pose]",
            "image (img2img)",
        ),
        (of("two-pass"), {"inputs": {"image": FILE}}, "spec.inputs[image]", "allowed: none"),
        (of("img2img"), {"inputs": {"image": "x.png"}}, "spec.inputs[image]", "64 hex digits"),
        (of("img2img"), {"inputs": {"image": OTHER}}, "spec.inputs[image]", "that this tenant"),
        (
            of("inpaint", _optional_image),
            {"inputs": {"mask": FILE}},
            "spec.inputs",
            "nothing without latents; allowed: inputs that inpaint runs with (nodes[2]",
        ),
        (
            of("two-pass", _no_negative_prompt),
            {"negative_prompt": "blur", "model": "small"},
            "spec.negative_prompt",
            "two-pass takes none",
        ),
        (
            of("two-pass", _three_quarters),
            {"shape": (256, 256)},
            "spec.shape",
            "found 192x192, of node first; allowed: 128x128, 64x64, 256x256 (emoji)",
        ),
        (of("two-pass", _model("nope")), {}, "spec.workflow", "found model nope, which two-pass"),
        (of("two-pass", _model("wan")), {}, "spec.shape", "64x64, of node first; allowed: 832x480"),
        (of("two-pass", _number("steps", 51)), {}, "spec.workflow", "found 51 steps of node first"),
        (of("two-pass", _number("guidance_scale", 11)), {}, "spec.workflow", "allowed: 1 to 10"),
        (of("two-pass"), {"model": "small"}, "spec.workflow", "encode_image of node encode"),
        *(
            (
                of(name),
                {"model": "plain", "inputs": dict.fromkeys(inputs, FILE)},
                "spec.workflow",
                f"{port} of node denoise of {name}, which plain does not ",
            )
            for name, port, *inputs in (
                ("inpaint", "mask", "image", "mask"),
                ("edit", "reference", "image"),
                ("control", "control", "control"),
            )
        ),
        (
            of("two-pass"),
            {"model": "plain", "loras": ["style", "pixel:2"]},
            "spec.loras[1]",
            "found 'pixel'; allowed: style (plain)",
        ),
        (
            of("two-pass", _denoised_by_emoji),
            {"model": "plain", "loras": ["style"]},
            "spec.loras",
            "found style; allowed: none (two-pass denoises with emoji)",
        ),
        (
            of("img2img"),
            {"model": "wan", "inputs": {"image": FILE}},
            "spec.shape.frames",
            "found 81; allowed: 1 (img2img begins from pictures)",
        ),
        (of("two-pass"), {"steps": 51}, "spec.steps", "1 to 50"),
        (WantedWorkflow(known=("a", "b")), {"workflow": "c"}, "spec.workflow", "txt2img, a, b"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_told(
    wanted: WantedWorkflow, options: dict[str, object], field: str, told: str
) -> None:
    found = wrong(wanted, (OTHER,), **options)
    assert field in found and told in found[field], found


def _second_by(name: str) -> Callable[[WorkflowSpec], object]:
    """From the enlarged picture on, text included, another model."""

    def change(spec: WorkflowSpec) -> None:
        for node in spec.nodes:
            if node.id in ("text", "encode", "denoise", "decode"):
                node.model = name

    return change


@pytest.mark.parametrize(
    ("options", "field", "told"),
    [
        ({"steps": 5}, "spec.steps", "found 5 steps of node denoise of two-pass; allowed: 1 to 4"),
        ({"guidance_scale": 9.0}, "spec.guidance_scale", "found guidance scale 9 of node denoise"),
        (
            {"negative_prompt": "blur", "model": "guided"},
            "spec.negative_prompt",
            "found blur; allowed: none (quick, of node text, takes no such prompt)",
        ),
        (
            {"model": "stranger"},
            "spec.workflow",
            "embeddings of quick (emoji) for node first; allowed: those of the family far, of",
        ),
    ],
)
def test_what_a_request_says_is_checked_against_every_nodes_model(
    options: dict[str, object], field: str, told: str
) -> None:
    quick, guided, stranger = (ModelInfo() for _ in range(3))
    for model, name in ((quick, "quick"), (guided, "guided"), (stranger, "stranger")):
        model.CopyFrom(EMOJI)
        model.name = name
    quick.steps_max = quick.steps_default = 4
    quick.guidance_max, guided.guidance_kind, stranger.family = 8.0, "cfg", "far"
    wanted, models = of("two-pass", _second_by("quick")), (EMOJI, quick, guided, stranger)
    whole = completed(request("a red fox", model="emoji", steps=4), models, wanted).spec
    assert (whole.model, whole.steps) == ("emoji", 4)
    asked = request("a red fox", model="emoji", steps=4)
    for name, value in options.items():
        setattr(asked.spec, name, value)
    with pytest.raises(InvalidRequest) as caught:
        completed(asked, models, wanted)
    found = {v.field: v.description for v in caught.value.violations}
    assert told in found[field] and len(found) == 1, found
    quick.guidance_kind = "none"  # then there is nothing that a scale could change
    if field == "spec.guidance_scale":
        completed(asked, models, wanted)


def test_a_workflow_may_say_which_model_a_request_means() -> None:
    wanted = of("two-pass", _second_by("other"))
    other = ModelInfo()
    other.CopyFrom(EMOJI)
    other.name, other.steps_default = "other", 7
    whole = completed(request("a red fox"), (EMOJI, other), wanted).spec
    assert (whole.model, whole.steps) == ("other", 7)
    assert whole.shape == Shape(width=128, height=128, frames=1)


class Leader:
    """Answers as control does, and counts what it is asked."""

    def __init__(self) -> None:
        self.specs: dict[str, WorkflowSpec] = {}
        self.asked: list[str] = []
        self.away = False

    async def ask(self, question: Callable[[Any], Awaitable[Any]]) -> Any:
        return await question(self)

    async def GetWorkflow(self, request: Any) -> GetWorkflowResponse:
        self.asked.append(request.name)
        if self.away:
            raise NotReady()
        if request.name not in self.specs:
            raise Refused("UNKNOWN_WORKFLOW", request.name)
        return GetWorkflowResponse(workflow=self.specs[request.name])

    async def ListWorkflows(self, request: Any) -> ListWorkflowsResponse:
        return ListWorkflowsResponse(workflows=[*shipped().values(), *self.specs.values()])

    async def RegisterWorkflow(self, request: Any) -> GetWorkflowResponse:
        self.specs[request.workflow.name] = request.workflow
        return GetWorkflowResponse(workflow=request.workflow)

    async def DeleteWorkflow(self, request: Any) -> None:
        del self.specs[request.name]


async def test_names_are_asked_for_once_in_a_while() -> None:
    leader, clock = Leader(), ManualClock()
    names = WorkflowNames(leader.ask, clock)
    for own in ("", "txt2img"):
        assert await names.wanted(own, [EMOJI]) == WantedWorkflow()
    two_pass = shipped()["two-pass"]
    assert (await names.wanted("two-pass", [EMOJI])).spec == two_pass
    assert (await names.wanted(named(two_pass), [EMOJI])).spec == two_pass
    for unknown in ("two-pass@00000000", "Not A Name", "own"):
        found = await names.wanted(unknown, [EMOJI])
        assert found.spec is None and found.known == tuple(shipped())
    assert leader.asked == ["own"]
    spec = of("two-pass").spec
    assert spec is not None
    await names.register(spec, only_check=False)
    leader.specs["own"] = spec
    for _ in range(3):
        assert (await names.wanted("own", [EMOJI])).spec == spec
    assert leader.asked == ["own", "own"]
    clock.advance_to(clock.now_us() + 2_000_000)
    leader.away = True
    with pytest.raises(NotReady):
        await names.wanted("own", [EMOJI])
    leader.away = False
    assert (await names.wanted("own", [EMOJI])).spec == spec
    await names.delete("own")
    assert (await names.wanted("own", [EMOJI])).spec is None


def test_a_request_is_left_as_it_was() -> None:
    asked = request("a red fox", workflow="two-pass")
    before = GenerateRequest.FromString(asked.SerializeToString())
    completed(asked, MODELS, of("two-pass"))
    assert asked == before
