"""Uploaded pictures, decoded and made what workers take: PNG, 8-bit RGB, or 8-bit grey of a mask.

What can be converted is, and said so; what cannot be is refused by name. Sizes are checked by what
the file's header says before anything is decoded. Runs outside the event loop.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from hocket.errors import InvalidRequest, Violation

FILE_BYTES_MAX = 64 << 20
SIDE_MAX = 8192
PIXELS_MAX = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_ALLOWED = "a PNG, JPEG or WebP file, or a GIF of one picture"
_ORIENTATION = 0x0112
_FIELD = "data"


@dataclass(frozen=True)
class ConvertedPicture:
    """A picture as it is stored."""

    png: bytes
    width: int
    height: int
    conversions: tuple[str, ...]


def converted(content: bytes, *, mask: bool) -> ConvertedPicture:
    """The picture in a file. Raises InvalidRequest: no picture, a broken or a large one."""
    _check_webp_size(content)
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            _check_size(*picture.size)
            told = _check_frames(picture)
            picture.load()
            return _stored(picture, content, told, mask=mask)
    except UnidentifiedImageError:
        found = "an empty file" if not content else f"a file that begins with {content[:8]!r}"
        raise _refusal(found, _ALLOWED) from None
    except Image.DecompressionBombError:
        raise _refusal("a picture of more than 178 megapixels", _sizes()) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        # Each of Pillow's decoders has its own way to say that a file is broken.
        found = f"a broken or truncated picture ({error})"
        raise _refusal(found, "a whole file that decodes") from None


def _stored(
    picture: Image.Image, content: bytes, told: list[str], *, mask: bool
) -> ConvertedPicture:
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        told.append("rotated as its EXIF says")
        picture = ImageOps.exif_transpose(picture)
    if picture.info.get("icc_profile"):
        told.append("its colour profile was left out")
    plain = _eight_bits(picture, content, told)
    plain = _opaque(plain, told)
    wanted = "L" if mask else "RGB"
    if plain.mode != wanted:
        words = {"P": "palette", "L": "greyscale", "1": "black and white", "CMYK": "CMYK"}
        told.append(f"{words.get(plain.mode, plain.mode)} to {'grey' if mask else 'RGB'}")
        plain = plain.convert(wanted)
    plain.info.clear()  # nothing is kept that the file said beside its pixels
    file = io.BytesIO()
    plain.save(file, "PNG", compress_level=1)
    return ConvertedPicture(file.getvalue(), *plain.size, tuple(told))


def _eight_bits(picture: Image.Image, content: bytes, told: list[str]) -> Image.Image:
    """Of a picture with 16 bits a channel the upper eight; Pillow has colours so already."""
    is_deep_png = picture.format == "PNG" and content[24:25] == b"\x10"
    if picture.mode.startswith("I"):
        told.append("16 bits a channel to 8")
        return picture.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if is_deep_png:
        told.append("16 bits a channel to 8")
    return picture


def _opaque(picture: Image.Image, told: list[str]) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    if picture.mode in ("P", "RGB", "L", "1"):
        told.append("a transparent colour made white")
    else:
        told.append("alpha laid over white")
    above = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    white = Image.new("RGB", above.size, "white")
    white.paste(above, mask=above.getchannel("A"))
    return white


def _check_frames(picture: Image.Image) -> list[str]:
    """What is said of a file of several pictures that are no animation."""
    if not getattr(picture, "is_animated", False):
        return []
    if picture.format == "MPO":  # a camera's JPEG with previews behind it
        return [f"the first of its {getattr(picture, 'n_frames', 2)} pictures"]
    # How many is not asked: Pillow would walk through all of a GIF's, however small they are.
    raise _refusal(f"an animated {picture.format}", "a still picture")


def _check_size(width: int, height: int) -> None:
    if not (width and height) or max(width, height) > SIDE_MAX or width * height > PIXELS_MAX:
        raise _refusal(f"a picture of {width}x{height} pixels", _sizes())


def _check_webp_size(content: bytes) -> None:
    """Before Pillow, which makes room for all of a WebP's pixels when it opens one."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return
    match content[12:16]:
        case b"VP8X":
            size = (_number(content[24:27]) + 1, _number(content[27:30]) + 1)
        case b"VP8L":
            bits = _number(content[21:25])
            size = ((bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
        case b"VP8 ":
            size = (_number(content[26:28]) & 0x3FFF, _number(content[28:30]) & 0x3FFF)
        case _:
            return
    _check_size(*size)


def _number(content: bytes) -> int:
    return int.from_bytes(content, "little")


def _sizes() -> str:
    return f"at most {SIDE_MAX} pixels a side and {PIXELS_MAX // 1_000_000} megapixels"


def _refusal(found: str, allowed: str) -> InvalidRequest:
    return InvalidRequest((Violation(_FIELD, f"found {found}; allowed: {allowed}"),))
