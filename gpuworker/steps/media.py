"""Finished frames as bytes of a media type.

The bytes depend on the pixels, the settings and the pinned codecs alone: no time, no software name,
no text chunk is written, and one thread encodes, so that digests can be compared between runs.

PNG and WebP keep every pixel. MP4 is H.264 with chroma at half the resolution (yuv420p), which is
what browsers and phones play; that asks for even sides, so that the last row or column of an odd
picture is repeated. `MediaInfo` tells the size of the file.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray
from PIL import Image

from hocket import media_types
from hocket.v1.types_pb2 import MediaInfo

_PNG_COMPRESSION = 6
# At this quality the loss is not seen. Chroma sits where the conversion below puts it.
_X264 = {
    "preset": "medium",
    "crf": "17",
    "chroma_sample_location": "center",
    # Its fast code reads past the rows of small videos: one in six came out otherwise at 56x40.
    "x264-params": "mbtree=0",
}
_MP4 = {"movflags": "+faststart", "fflags": "+bitexact"}  # the index first: plays while it loads
_RGB_TO_YUV = (  # the same numbers on every processor
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


class MediaTypeRefused(Exception):
    """A media type that these frames cannot have. Fields: `media_type`, `allowed`."""

    def __init__(self, media_type: str, allowed: Sequence[str]) -> None:
        super().__init__(f"media_type={media_type}: allowed is {', '.join(allowed)}")
        self.media_type, self.allowed = media_type, tuple(allowed)


def encode_media(
    frames: NDArray[np.uint8], media_type: str = "", fps: int = 0
) -> tuple[bytes, MediaInfo]:
    """Encodes uint8 [frames, height, width, 3]; returns the bytes and what they are.

    An empty media type stands for the default, see `media_types.offered`. `fps`, in frames per
    second, is for several frames only. Raises `MediaTypeRefused`.
    """
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3, frames.shape
    count = len(frames)
    assert count == 1 or fps > 0, (count, fps)
    allowed = media_types.offered(count)
    media_type = media_type or allowed[0]
    if media_type not in allowed:
        raise MediaTypeRefused(media_type, allowed)
    if media_type == media_types.MP4:
        frames = _with_even_sides(frames)
        content = _mp4(frames, fps)
    elif media_type == media_types.WEBP:
        content = _webp(frames, fps)
    else:
        content = _png(frames[0])
    _, height, width, _ = frames.shape
    info = MediaInfo(media_type=media_type, width=width, height=height, frames=count)
    if count > 1:
        info.fps, info.duration_us = fps, round(count * 1_000_000 / fps)
    return content, info


def _png(frame: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    _image(frame).save(buffer, "PNG", compress_level=_PNG_COMPRESSION)
    return buffer.getvalue()


def _webp(frames: NDArray[np.uint8], fps: int) -> bytes:
    """Without loss; several frames loop."""
    buffer = io.BytesIO()
    first, *others = (_image(frame) for frame in frames)
    animation = {"save_all": True, "append_images": others, "loop": 0}
    first.save(
        buffer,
        "WEBP",
        lossless=True,
        quality=50,
        method=2,
        **({**animation, "duration": _durations_ms(len(frames), fps)} if others else {}),
    )
    return buffer.getvalue()


def _durations_ms(count: int, fps: int) -> list[int]:
    """Whole milliseconds of each frame, such that the whole does not drift."""
    starts = [round(number * 1000 / fps) for number in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(starts)]


def _mp4(frames: NDArray[np.uint8], fps: int) -> bytes:
    # A file, since putting the index first makes the muxer read what it has written.
    with tempfile.TemporaryDirectory(prefix="hocket-") as folder:
        path = Path(folder) / "video.mp4"
        _write_mp4(path, frames, fps)
        return path.read_bytes()


def _write_mp4(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    with av.open(path, "w", format="mp4", options=_MP4) as container:
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1
        codec.flags |= Flags.bitexact
        codec.color_range, codec.colorspace = ColorRange.MPEG, Colorspace.ITU709
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for number, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_RGB_TO_YUV,
            )
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _with_even_sides(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    _, height, width, _ = frames.shape
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _image(frame: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame), "RGB")
