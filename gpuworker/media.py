"""Finished frames as bytes of a media type.

The bytes depend on the pixels (and the pinned codec) alone: no time, no software name, no text
chunk is written, so that the digest of a picture can be compared between runs.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FRAME_MS = 62  # 16 frames a second, what Wan's videos are made for
_PNG_COMPRESSION = 6


def encode_media(frames: NDArray[np.uint8], frame_ms: int = _FRAME_MS) -> tuple[bytes, str]:
    """Encodes uint8 [frames, height, width, 3] without loss; returns (bytes, media type).

    One frame becomes a PNG, several an animated WebP that loops.
    """
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3, frames.shape
    images = [Image.fromarray(np.ascontiguousarray(frame), "RGB") for frame in frames]
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, "PNG", compress_level=_PNG_COMPRESSION)
        return buffer.getvalue(), "image/png"
    images[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=frame_ms,
        loop=0,
        lossless=True,
        quality=50,
        method=2,
    )
    return buffer.getvalue(), "image/webp"
