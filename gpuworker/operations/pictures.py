"""Pictures outside of models: read from a file that a request brought, and brought to a size.

Pillow does it, one frame after the other; the same pixels come out on every host. Pixels are uint8
[frames, height, width, channels].
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from gpuworker.operations.names import OperationRefused

Pixels = NDArray[np.uint8]
METHODS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_PIXELS_MAX = 1 << 26  # of a file; a small one can say that it is huge
_BLACK = 0


def read_picture(content: bytes, mode: str) -> Image.Image:
    """A PNG as the store of inputs has it, as `mode` "RGB" or "L". Raises `OperationRefused`."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG",))
        if picture.width * picture.height > _PIXELS_MAX:
            size = f"{picture.width}x{picture.height}"
            raise OperationRefused("file", size, f"{_PIXELS_MAX} pixels at most")
        return picture.convert(mode)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise OperationRefused("file", f"{error}"[:200], "a PNG, 8-bit RGB or grey") from error


def fitted(picture: Image.Image, width: int, height: int, fit: str) -> Pixels:
    """The picture at a size: "cover" cuts off what is beyond it, "contain" fills up with black,
    "stretch" keeps no proportions.
    """
    size, lanczos = (width, height), Image.Resampling.LANCZOS
    if fit == "cover":
        made = ImageOps.fit(picture, size, lanczos)
    elif fit == "contain":
        made = ImageOps.pad(picture, size, lanczos, color=_BLACK)
    else:
        made = picture if picture.size == size else picture.resize(size, lanczos)
    pixels: Pixels = np.asarray(made, np.uint8)
    return pixels.reshape(1, height, width, -1)


def resized(pixels: Pixels, width: int, height: int, method: str) -> Pixels:
    """Every frame at another size; the same pixels where the size is the same."""
    if pixels.shape[1:3] == (height, width):
        return pixels
    frames = [
        Image.fromarray(np.ascontiguousarray(_picture(frame))).resize(
            (width, height), METHODS[method]
        )
        for frame in pixels
    ]
    made: Pixels = np.stack([np.asarray(frame, np.uint8) for frame in frames])
    return made.reshape(len(frames), height, width, -1)


def _picture(frame: Pixels) -> Pixels:
    """Pillow knows grey pictures without a third axis only."""
    return frame[:, :, 0] if frame.shape[2] == 1 else frame
