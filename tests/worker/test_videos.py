"""Videos as files: written, decoded again with PyAV and PIL, and compared."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image

from gpuworker.steps.media import MediaTypeRefused, encode_media
from hocket.v1.types_pb2 import MediaInfo

MEAN_LEVELS_MAX = 3.0  # of 255, for half the chroma and the codec; most at 120 frames a second
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
ROOT = Path(__file__).resolve().parents[2]


def waves(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colours that move: uint8 [count, height, width, 3]."""
    time, y, x = np.mgrid[0:count, 0:height, 0:width]
    red, green = np.sin((x + 4 * time) / 17), np.sin((y - 3 * time) / 13)
    blue = np.sin((x + y + 5 * time) / 23)
    return (127.5 + 127.5 * np.stack([red, green, blue], -1)).round().astype(np.uint8)


def played(content: bytes) -> tuple[NDArray[np.uint8], av.VideoStream]:
    """All frames of an MP4, and its stream."""
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        frames = [
            frame.to_ndarray(format="rgb24", interpolation=EXACT)
            for frame in container.decode(stream)
        ]
    return np.stack(frames).astype(np.uint8), stream


def mean_levels(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    return float(np.abs(ours.astype(int) - theirs.astype(int)).mean())


@pytest.mark.parametrize("fps", [1, 16, 24, 120])
def test_an_mp4_plays_what_was_made(fps: int) -> None:
    frames = waves(9, 48, 64)
    content, info = encode_media(frames, fps=fps)
    duration_us = round(9e6 / fps)
    assert info == MediaInfo(
        media_type="video/mp4", width=64, height=48, frames=9, fps=fps, duration_us=duration_us
    )
    back, stream = played(content)
    codec = stream.codec_context
    assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 64, 48)
    assert (stream.average_rate, stream.frames) == (fps, 9)
    assert stream.duration is not None and stream.time_base is not None
    assert float(stream.duration * stream.time_base) == pytest.approx(9 / fps, abs=1e-3)
    assert back.shape == frames.shape
    assert mean_levels(back, frames) <= MEAN_LEVELS_MAX
    assert mean_levels(back[::-1], frames) > 5 * MEAN_LEVELS_MAX, "frames in their order"
    assert mean_levels(back[..., ::-1], frames) > 5 * MEAN_LEVELS_MAX, "colours in their order"


def test_an_mp4_begins_with_its_index() -> None:
    content, _ = encode_media(waves(5, 32, 32), fps=16)
    assert content.index(b"ftyp") < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(33, 47), (33, 48), (32, 47), (1, 1)])
def test_odd_sides_get_their_last_line_twice(height: int, width: int) -> None:
    frames = waves(5, height, width)
    content, info = encode_media(frames, "video/mp4", 16)
    even = (height + height % 2, width + width % 2)
    back, _ = played(content)
    assert (info.height, info.width) == even == back.shape[1:3]
    assert mean_levels(back[:, :height, :width], frames) <= MEAN_LEVELS_MAX
    assert mean_levels(back[:, -1, -1], frames[:, -1, -1]) <= 5 * MEAN_LEVELS_MAX, "no black edge"


@pytest.mark.parametrize("media_type", ["video/mp4", "image/webp"])
def test_the_bytes_depend_on_pixels_and_settings_only(media_type: str) -> None:
    frames = waves(6, 40, 56)
    content, _ = encode_media(frames, media_type, 16)
    assert encode_media(frames, media_type, 16)[0] == content
    assert elsewhere(media_type) == hashlib.sha256(content).hexdigest()
    assert encode_media(frames, media_type, 17)[0] != content
    changed = frames.copy()
    changed[3, :8, :8] ^= 0x40
    assert encode_media(changed, media_type, 16)[0] != content


def test_what_lies_about_in_memory_leaves_no_trace_in_a_small_video() -> None:
    frames, digests, lumber = waves(6, 40, 56), set(), []
    chance = random.Random(2)
    for turn in range(30):
        content, _ = encode_media(frames, "video/mp4", 16)
        digests.add(hashlib.sha256(content).hexdigest())
        lumber.append(np.full(chance.randint(1_000, 2_000_000), turn, np.uint8))
        if turn % 3 == 0:
            lumber.pop(chance.randrange(len(lumber)))
    assert len(digests) == 1


def elsewhere(media_type: str) -> str:
    """Digest of the same video from another process, in another time zone, of another hash seed."""
    code = (
        "import hashlib\n"
        "from gpuworker.steps.media import encode_media\n"
        "from tests.worker.test_videos import waves\n"
        f"content, _ = encode_media(waves(6, 40, 56), {media_type!r}, 16)\n"
        "print(hashlib.sha256(content).hexdigest())\n"
    )
    surroundings = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=surroundings,
        check=True,
    )
    return run.stdout.strip()


@pytest.mark.parametrize("fps", [7, 16, 60])
def test_an_animated_webp_keeps_pixels_and_time(fps: int) -> None:
    frames = waves(8, 24, 32)
    content, info = encode_media(frames, "image/webp", fps)
    assert (info.media_type, info.frames, info.fps) == ("image/webp", 8, fps)
    durations_ms = []
    with Image.open(io.BytesIO(content)) as animation:
        assert animation.size == (32, 24) and animation.info["loop"] == 0
        for number in range(8):
            animation.seek(number)
            assert np.array_equal(np.asarray(animation.convert("RGB")), frames[number])
            durations_ms.append(animation.info["duration"])
    assert sum(durations_ms) == round(8000 / fps), "it does not drift"
    assert max(durations_ms) - min(durations_ms) <= 1


def test_a_picture_as_webp() -> None:
    frames = waves(1, 17, 19)
    content, info = encode_media(frames, "image/webp")
    assert info == MediaInfo(media_type="image/webp", width=19, height=17, frames=1)
    with Image.open(io.BytesIO(content)) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), frames[0])


@pytest.mark.parametrize(
    ("count", "media_type", "allowed"),
    [
        (1, "video/mp4", ("image/png", "image/webp")),
        (2, "image/png", ("video/mp4", "image/webp")),
        (2, "video/webm", ("video/mp4", "image/webp")),
    ],
)
def test_a_type_that_the_frames_cannot_have(
    count: int, media_type: str, allowed: tuple[str, ...]
) -> None:
    with pytest.raises(MediaTypeRefused) as refused:
        encode_media(waves(count, 16, 16), media_type, 16)
    assert (refused.value.media_type, refused.value.allowed) == (media_type, allowed)
