"""Pictures that requests brought, brought to a size; settings that a call cannot have."""

from __future__ import annotations

import io

import numpy as np
import pytest
from google.protobuf.struct_pb2 import Value
from PIL import Image

from gpuworker.operations.making import JobCall, load_mask, pixels_artifact, pixels_of, resize
from gpuworker.operations.names import OperationRefused, settings_of
from gpuworker.operations.pictures import Pixels, fitted, read_picture, resized
from hocket.v1 import mesh_pb2, types_pb2


def png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def halves() -> Pixels:
    """4 x 8: white above, black below."""
    made = np.zeros((8, 4, 3), np.uint8)
    made[:4] = 255
    return made


def call(op: str, size: tuple[int, int], **settings: Value) -> mesh_pb2.BatchMember:
    shape = types_pb2.Shape(width=size[0], height=size[1], frames=1)
    return mesh_pb2.BatchMember(
        request_id="r", call=mesh_pb2.NodeCall(op=op, shape=shape, settings=settings)
    )


def test_a_picture_is_cut_filled_up_or_stretched_to_its_size() -> None:
    picture = read_picture(png(halves()), "RGB")
    cover, contain, stretch = (fitted(picture, 8, 8, f) for f in ("cover", "contain", "stretch"))
    assert all(made.shape == (1, 8, 8, 3) for made in (cover, contain, stretch))
    assert cover[0, 0].min() > 200 and cover[0, -1].max() < 50, "no more than the middle"
    assert contain[0, :, :2].max() == 0 and contain[0, 0, 3].min() > 200, "black beside it"
    assert stretch[0, 0].min() > 200 and stretch[0, -1].max() < 50
    assert np.array_equal(fitted(picture, 4, 8, "stretch")[0], halves()), "its own size: untouched"


def test_a_mask_has_one_channel_and_keeps_it() -> None:
    content = png(halves()[:, :, 0])
    mask = load_mask(JobCall(call("load_mask", (8, 8)), None, {}, {"mask": content}))
    assert pixels_of(mask).shape == (1, 8, 8, 1)
    method = Value(string_value="nearest")
    member = call("resize", (2, 4), method=method)
    small = pixels_of(resize(JobCall(member, None, {"image": mask})))
    assert small.shape == (1, 4, 2, 1) and small[0, 0].min() == 255 and small[0, -1].max() < 50


def test_every_frame_is_resized() -> None:
    frames = np.stack([halves(), 255 - halves()])
    for method in ("lanczos", "bicubic", "nearest"):
        made = resized(frames, 2, 4, method)
        assert made.shape == (2, 4, 2, 3) and made[0, 0, 0, 0] > 200 and made[1, 0, 0, 0] < 50
    assert resized(frames, 4, 8, "lanczos") is frames
    assert pixels_artifact(frames).facts == {"width": 4, "height": 8, "frames": 2}


@pytest.mark.parametrize("content", [b"", b"GIF89a", png(halves())[:48], b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(OperationRefused) as refused:
        read_picture(content, "RGB")
    assert refused.value.field == "file" and "PNG" in refused.value.allowed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", Value(number_value=2)),
        ("strength", Value(string_value="half")),
        ("strength", Value(bool_value=True)),
        ("steps", Value(number_value=1.5)),
        ("unknown", Value(number_value=1)),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: Value) -> None:
    with pytest.raises(OperationRefused) as refused:
        settings_of("denoise", {name: value})
    assert name in str(refused.value)
    assert settings_of("denoise", {})["strength"] == 1.0


def test_what_is_missing_is_named() -> None:
    with pytest.raises(OperationRefused, match="mask"):
        load_mask(JobCall(call("load_mask", (8, 8)), None, {}))
    with pytest.raises(OperationRefused, match="image"):
        resize(JobCall(call("resize", (8, 8)), None, {}))
