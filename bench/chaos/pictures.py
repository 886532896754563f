"""A file beside the undisturbed one: equal, within a level, or different.

Files of the same request are equal byte for byte when the same layout made them: the same number
of members, the same company in a batch. Other layouts add floating-point numbers in another order:
decoded pictures may then differ by one level of 255 a value. A clip is compressed with losses,
which spreads such a level over its blocks: its frames are compared by their mean distance.
"""

from __future__ import annotations

import io

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

EQUAL, NEAR = "equal", "within a level"
_CLIP_MEAN_LEVELS = 1.0

Pixels = npt.NDArray[np.int16]


def compare(file: bytes, reference: bytes, *, exact: bool) -> str:
    """EQUAL, NEAR (never where `exact`), or what is wrong in words."""
    if file == reference:
        return EQUAL
    if exact:
        return f"not byte-equal ({len(file)} and {len(reference)} bytes)"
    ours, theirs = pixels(file), pixels(reference)
    if ours.shape != theirs.shape:
        return f"of another shape: {ours.shape} instead of {theirs.shape}"
    apart = np.abs(ours - theirs)
    if ours.ndim == 3:
        return NEAR if int(apart.max()) <= 1 else f"up to {int(apart.max())} levels apart"
    mean = float(apart.mean())
    return NEAR if mean <= _CLIP_MEAN_LEVELS else f"on average {mean:.2f} levels apart"


def pixels(file: bytes) -> Pixels:
    """Height, width, 3; of a clip its frames before them."""
    if file.startswith(b"\x89PNG"):
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(np.int16)
    with av.open(io.BytesIO(file), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.int16)
