"""Validation: a table of what is wrong and what is told, and properties of what is completed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.validation import PROMPT_CHARS_MAX, _check_prompts, _Violations, completed
from hocket import frame_counts, free_sizes, media_types
from hocket.client import request
from hocket.errors import InvalidRequest
from hocket.v1.generation_pb2 import FrameCounts, GenerateRequest, ModelInfo
from hocket.v1.types_pb2 import GenerationSpec, OnMiss, Shape
from tests.gateway.peer import EMOJI

VIDEO = ModelInfo(
    name="wan",
    workflows=["txt2vid"],
    shapes=[Shape(width=832, height=480, frames=81, fps=16)],
    steps_min=10,
    steps_max=60,
    steps_default=50,
    guidance_kind="cfg",
    guidance_min=1.0,
    guidance_max=20.0,
    guidance_default=5.0,
)
LENGTHS = ModelInfo()
LENGTHS.CopyFrom(VIDEO)
LENGTHS.MergeFrom(
    ModelInfo(
        shapes=[Shape(width=480, height=832, frames=81, fps=16)],
        frames=FrameCounts(minimum=1, maximum=121, multiple=4, offset=1, default_count=81),
    )
)
LENGTHS.name = "wan-lengths"
FREE = ModelInfo()
FREE.CopyFrom(EMOJI)
FREE.MergeFrom(ModelInfo(size_multiple=16, size_min=32, size_max=2048, pixels_max=1 << 20))
FREE.name = "free"
del FREE.shapes[:]
FREE.shapes.add(width=1024, height=1024)
FREE_CLIPS = ModelInfo()
FREE_CLIPS.CopyFrom(LENGTHS)
FREE_CLIPS.MergeFrom(ModelInfo(size_multiple=16, size_min=16, size_max=1280, pixels_max=921_600))
FREE_CLIPS.name = "free-clips"
MODELS = (EMOJI, VIDEO, LENGTHS, FREE, FREE_CLIPS)


def wrong(change: Callable[[GenerateRequest], object]) -> dict[str, str]:
    asked = request("a red fox")
    change(asked)
    with pytest.raises(InvalidRequest) as caught:
        completed(asked, MODELS)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_free_sizes_are_taken_within_their_limits() -> None:
    for size in ((1024, 1024), (2048, 512), (32, 48)):
        whole = completed(request("a fox", model="free", shape=size), MODELS).spec.shape
        assert whole == Shape(width=size[0], height=size[1], frames=1)
    clip = request("waves", model="free-clips", shape=(1280, 720), frames=5)
    assert completed(clip, MODELS).spec.shape == Shape(width=1280, height=720, frames=5, fps=16)


@pytest.mark.parametrize(
    ("model", "shape", "told"),
    [
        ("free", (1000, 2064), {"width": "32 to 2048 in steps of 16", "height": "32 to 2048"}),
        ("free", (1024, 1040), {"": "at most 1048576 pixels; nearest: 1008x1024"}),
        ("free", (16, 16), {"width": "nearest: 32x32", "height": "nearest: 32x32"}),
        ("free-clips", (1280, 1280, 3), {"": "nearest: 960x960", "frames": "nearest: 1"}),
    ],
)
def test_a_size_that_is_not_taken_is_told_with_the_nearest(
    model: str, shape: tuple[int, ...], told: dict[str, str]
) -> None:
    def ask(r: GenerateRequest) -> None:
        r.spec.model = model
        r.spec.shape.CopyFrom(Shape(width=shape[0], height=shape[1], frames=sum(shape[2:])))

    found = wrong(ask)
    assert found.keys() == {f"spec.shape.{name}".removesuffix(".") for name in told}
    for name, text in told.items():
        assert text in found[f"spec.shape.{name}".removesuffix(".")]


@given(st.integers(0, 2**32 - 1), st.integers(0, 5000), st.sampled_from((FREE, FREE_CLIPS)))
def test_the_nearest_size_is_always_one_that_is_taken(
    width: int, height: int, model: ModelInfo
) -> None:
    assert free_sizes.takes(model, *free_sizes.nearest(model, width, height))
    if free_sizes.takes(model, width, height):
        assert free_sizes.nearest(model, width, height) == (width, height)


def test_defaults_are_filled_in() -> None:
    whole = completed(request("a red fox"), MODELS)
    assert (whole.spec.model, whole.spec.workflow, whole.spec.steps) == ("emoji", "txt2img", 20)
    shape = whole.spec.shape
    assert (shape.width, shape.height, shape.frames) == (128, 128, 1)
    assert whole.spec.guidance_scale == 4.0
    assert whole.slo.on_miss == OnMiss.ON_MISS_BEST_EFFORT
    assert whole.progress_every == 1
    assert not whole.spec.HasField("seed"), "the servicer draws it"


def test_a_video_model_fills_in_frames_and_rate() -> None:
    shape = completed(request("waves", model="wan"), MODELS).spec.shape
    assert (shape.width, shape.height, shape.frames, shape.fps) == (832, 480, 81, 16)
    assert completed(request("waves", model="wan", fps=24), MODELS).spec.shape.fps == 24


@pytest.mark.parametrize("size", [(832, 480), (480, 832)])
def test_a_number_of_frames_is_the_callers_to_choose(size: tuple[int, int]) -> None:
    shape = completed(request("waves", model="wan-lengths", shape=size), MODELS).spec.shape
    assert (shape.frames, shape.fps) == (81, 16), "the default where none is asked for"
    asked = request("waves", model="wan-lengths", shape=size, frames=17, fps=8)
    whole = completed(asked, MODELS).spec
    assert whole.shape == Shape(width=size[0], height=size[1], frames=17, fps=8)
    assert whole.media_type == media_types.MP4


def test_one_frame_of_a_video_model_is_a_picture() -> None:
    whole = completed(request("waves", model="wan-lengths", frames=1), MODELS).spec
    assert (whole.shape.frames, whole.shape.fps, whole.media_type) == (1, 0, media_types.PNG)
    with pytest.raises(InvalidRequest, match="0 for pictures"):
        completed(request("waves", model="wan-lengths", frames=1, fps=8), MODELS)


@given(
    multiple=st.integers(1, 9),
    offset=st.integers(0, 8),
    low=st.integers(0, 20),
    further=st.integers(0, 20),
    asked=st.integers(0, 2**32 - 1),
)
def test_the_nearest_number_of_frames_is_one_on_offer(
    multiple: int, offset: int, low: int, further: int, asked: int
) -> None:
    offset %= multiple
    least = low * multiple + offset
    counts = FrameCounts(
        minimum=least,
        maximum=least + further * multiple,
        multiple=multiple,
        offset=offset,
        default_count=least,
    )
    offered = range(least, counts.maximum + 1, multiple)
    near = frame_counts.nearest(counts, asked)
    assert near == min(offered, key=lambda number: (abs(number - asked), number))
    assert frame_counts.offers(counts, asked) == (asked in offered)


@pytest.mark.parametrize(
    ("model", "asked_for", "given"),
    [
        ("emoji", "", "image/png"),
        ("emoji", "image/webp", "image/webp"),
        ("wan", "", "video/mp4"),
        ("wan", "video/mp4", "video/mp4"),
        ("wan", "image/webp", "image/webp"),
    ],
)
def test_a_media_type_is_filled_in_or_kept(model: str, asked_for: str, given: str) -> None:
    whole = completed(request("a fox", model=model, media_type=asked_for), MODELS)
    assert whole.spec.media_type == given


def test_the_request_itself_is_left_alone() -> None:
    asked = request("a red fox")
    before = asked.SerializeToString()
    completed(asked, MODELS)
    assert asked.SerializeToString() == before


@pytest.mark.parametrize(
    ("field", "told", "change"),
    [
        (
            "spec.model",
            "found 'nope'; allowed: emoji, wan, wan-lengths",
            lambda r: _set(r.spec, model="nope"),
        ),
        ("spec.workflow", "allowed: txt2img", lambda r: _set(r.spec, workflow="txt2vid")),
        ("spec.prompt", "allowed: 1 to 2000", lambda r: _set(r.spec, prompt="  ")),
        (
            "spec.prompt",
            "found 2001 characters",
            lambda r: _set(r.spec, prompt="x" * (PROMPT_CHARS_MAX + 1)),
        ),
        (
            "spec.negative_prompt",
            "takes no such prompt",
            lambda r: _set(r.spec, negative_prompt="blur"),
        ),
        (
            "spec.shape.width",
            "found 100; allowed: 128x128, 64x64, 256x256; nearest: 128x128",
            lambda r: _set(r.spec.shape, width=100),
        ),
        (
            "spec.shape",
            "found 64x256; allowed:",
            lambda r: _set(r.spec.shape, width=64, height=256),
        ),
        ("spec.shape.frames", "found 9", lambda r: _set(r.spec.shape, frames=9)),
        (
            "spec.shape.frames",
            "found 18; allowed: 1 to 121, 1 more than a multiple of 4; nearest: 17",
            lambda r: (_set(r.spec, model="wan-lengths"), _set(r.spec.shape, frames=18)),
        ),
        (
            "spec.shape.frames",
            "found 125; allowed: 1 to 121, 1 more than a multiple of 4; nearest: 121",
            lambda r: (_set(r.spec, model="wan-lengths"), _set(r.spec.shape, frames=125)),
        ),
        (
            "spec.shape.width",
            "found 500; allowed: 832x480x17, 480x832x17; nearest: 832x480x17",
            lambda r: (_set(r.spec, model="wan-lengths"), _set(r.spec.shape, width=500, frames=17)),
        ),
        ("spec.shape.fps", "0 for pictures", lambda r: _set(r.spec.shape, fps=24)),
        (
            "spec.shape.fps",
            "found 121; allowed: 0 to 120 for videos",
            lambda r: (_set(r.spec, model="wan"), _set(r.spec.shape, fps=121)),
        ),
        (
            "spec.media_type",
            "found 'video/mp4'; allowed: image/png, image/webp for pictures",
            lambda r: _set(r.spec, media_type="video/mp4"),
        ),
        (
            "spec.media_type",
            "found 'image/png'; allowed: video/mp4, image/webp for videos",
            lambda r: _set(r.spec, model="wan", media_type="image/png"),
        ),
        (
            "spec.media_type",
            "found 'image/gif'; allowed:",
            lambda r: _set(r.spec, media_type="image/gif"),
        ),
        ("spec.steps", "found 51; allowed: 1 to 50", lambda r: _set(r.spec, steps=51)),
        ("spec.guidance_scale", "found nan", lambda r: _set(r.spec, guidance_scale=math.nan)),
        ("spec.guidance_scale", "found inf", lambda r: _set(r.spec, guidance_scale=math.inf)),
        ("spec.guidance_scale", "allowed: 1 to 10", lambda r: _set(r.spec, guidance_scale=0.5)),
        ("spec.loras[0]", "found 'pixel'; allowed: none", lambda r: r.spec.loras.append("pixel")),
        ("spec.loras[0]", "-4 to 4", lambda r: r.spec.loras.append("pixel:4.1")),
        ("spec.loras[0]", '"name:scale"', lambda r: r.spec.loras.append("pixel:nan")),
        ("spec.inputs", "txt2img takes no files", lambda r: r.spec.inputs.update(pose="object")),
        ("slo.deadline_us", "(24 h)", lambda r: _set(r.slo, deadline_us=86_400_000_001)),
        (
            "slo.degrade",
            "found no limits with ON_MISS_DEGRADE",
            lambda r: _set(r.slo, on_miss=OnMiss.ON_MISS_DEGRADE),
        ),
        (
            "slo.degrade.steps_min",
            "found 21; allowed: 0 to 20",
            lambda r: _set(r.slo.degrade, steps_min=21),
        ),
        (
            "slo.degrade.height_min",
            "found 129; allowed: 0 to 128",
            lambda r: _set(r.slo.degrade, height_min=129),
        ),
        ("slo.commitment", "found 7", lambda r: _set(r.slo, commitment=7)),
        ("slo.on_miss", "found 9", lambda r: _set(r.slo, on_miss=9)),
        ("priority", "found -101; allowed: -100 to 100", lambda r: _set(r, priority=-101)),
        ("tenant", "at most 64", lambda r: _set(r, tenant="a b")),
        ("tenant", "at most 64", lambda r: _set(r, tenant="a" * 65)),
        ("idempotency_key", "at most 128", lambda r: _set(r, idempotency_key="a\nb")),
    ],
)
def test_one_thing_wrong_is_told_once(
    field: str, told: str, change: Callable[[GenerateRequest], object]
) -> None:
    found = wrong(change)
    assert list(found) == [field]
    assert told in found[field]


def test_everything_wrong_is_told_at_once() -> None:
    def spoil(asked: GenerateRequest) -> None:
        _set(asked.spec, prompt="", steps=999, model="wan", guidance_scale=-1.0)
        _set(asked.spec.shape, width=1, height=2, frames=3)
        _set(asked, priority=1000, tenant="!")

    assert set(wrong(spoil)) == {
        "spec.prompt",
        "spec.steps",
        "spec.guidance_scale",
        "spec.shape.width",
        "spec.shape.height",
        "spec.shape.frames",
        "priority",
        "tenant",
    }


def test_an_unknown_model_does_not_hide_the_rest() -> None:
    assert set(wrong(lambda r: _set(r.spec, model="nope", prompt=""))) == {
        "spec.model",
        "spec.prompt",
    }


def test_a_model_without_guidance_takes_its_own_only() -> None:
    plain = ModelInfo()
    plain.CopyFrom(EMOJI)
    plain.guidance_kind = "none"
    assert completed(request("a fox", guidance=4.0), [plain]).spec.guidance_scale == 4.0
    with pytest.raises(InvalidRequest, match="allowed: 4 to 4"):
        completed(request("a fox", guidance=5.0), [plain])


@given(
    prompt=st.text(max_size=50),
    width=st.integers(0, 2**32 - 1),
    height=st.sampled_from([0, 64, 128, 256, 300, 480]),
    frames=st.integers(0, 130),
    steps=st.integers(0, 2**32 - 1),
    guidance=st.none() | st.floats(),
    deadline_us=st.integers(0, 2**64 - 1),
    priority=st.integers(-(2**31), 2**31 - 1),
    on_miss=st.integers(0, 5),
    model=st.sampled_from(["", "emoji", "wan", "wan-lengths", "nope"]),
    media_type=st.sampled_from(["", "image/png", "image/webp", "video/mp4", "MP4"]),
)
def test_completed_or_refused_and_completing_twice_changes_nothing(
    prompt: str,
    width: int,
    height: int,
    frames: int,
    steps: int,
    guidance: float | None,
    deadline_us: int,
    priority: int,
    on_miss: int,
    model: str,
    media_type: str,
) -> None:
    asked = request(prompt, model=model, steps=steps, guidance=guidance, priority=priority)
    asked.spec.media_type = media_type
    _set(asked.spec.shape, width=width, height=height, frames=frames)
    _set(asked.slo, deadline_us=deadline_us, on_miss=on_miss)
    try:
        whole = completed(asked, MODELS)
    except InvalidRequest as error:
        assert error.violations
        assert all("allowed: " in violation.description for violation in error.violations)
        return
    served = next(m for m in MODELS if m.name == whole.spec.model)
    shape = whole.spec.shape
    sizes = {(s.width, s.height, s.frames or 1) for s in served.shapes}
    if served.HasField("frames"):
        assert frame_counts.offers(served.frames, shape.frames)
        assert (shape.width, shape.height) in {size[:2] for size in sizes}
    else:
        assert (shape.width, shape.height, shape.frames) in sizes
    assert served.steps_min <= whole.spec.steps <= served.steps_max
    assert whole.spec.media_type in media_types.offered(shape.frames)
    assert completed(whole, MODELS) == whole


def _set(message: object, **fields: object) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_control_characters_are_refused_and_line_ends_are_not(name: str) -> None:
    spec = GenerationSpec(prompt="a fox")
    setattr(spec, name, "a fox\r\n\tin snow")
    found = _Violations()
    _check_prompts(spec, found)
    assert not found.found
    for text in ("a\x00", "a\x0cb", "\x7f"):
        setattr(spec, name, text)
        found = _Violations()
        _check_prompts(spec, found)
        assert [v.field for v in found.found] == [f"spec.{name}"]
