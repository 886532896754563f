"""What people upload: converted where it can be, refused by name where it cannot."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from gateway.inputs import pictures
from gateway.inputs.pictures import converted
from hocket.errors import InvalidRequest

RED, WHITE = (200, 0, 0), (255, 255, 255)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def deep(colour: int) -> bytes:
    """A PNG with 16 bits a channel, 2x1: grey (0) or RGB (2)."""
    row = b"\x00" + struct.pack(">H", 0x8012) * (2 * (3 if colour == 2 else 1))
    return png(2, 1, 16, colour, row)


def png(width: int, height: int, bits: int, colour: int, row: bytes) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(red(), "JPEG", exif=exif, quality=95)


def see_through() -> Image.Image:
    picture = Image.new("RGBA", (6, 4), (*RED, 255))
    picture.paste((0, 0, 255, 0), (0, 0, 3, 4))
    return picture


def see_through_palette() -> bytes:
    picture = red("P")
    return saved(picture, "PNG", transparency=picture.getpixel((0, 0)))


@pytest.mark.parametrize(
    ("content", "told", "size", "corner"),
    [
        (saved(red(), "PNG"), (), (6, 4), RED),
        (saved(red(), "WEBP", lossless=True), (), (6, 4), RED),
        (saved(red("P"), "GIF"), ("palette to RGB",), (6, 4), None),
        (saved(red("L"), "PNG"), ("greyscale to RGB",), (6, 4), (60, 60, 60)),
        (saved(red("1"), "PNG"), ("black and white to RGB",), (6, 4), None),
        (saved(red("CMYK"), "JPEG", quality=100), ("CMYK to RGB",), (6, 4), None),
        (saved(see_through(), "PNG"), ("alpha laid over white",), (6, 4), WHITE),
        (saved(see_through(), "WEBP", lossless=True), ("alpha laid over white",), (6, 4), WHITE),
        (see_through_palette(), ("a transparent colour made white",), (6, 4), WHITE),
        (turned(), ("rotated as its EXIF says",), (4, 6), None),
        (saved(red(), "PNG", icc_profile=b"x" * 200), ("its colour profile",), (6, 4), RED),
        (deep(0), ("16 bits a channel to 8", "greyscale to RGB"), (2, 1), (128,) * 3),
        (deep(2), ("16 bits a channel to 8",), (2, 1), (128,) * 3),
    ],
)
def test_what_can_be_converted_is(
    content: bytes, told: tuple[str, ...], size: tuple[int, int], corner: tuple[int, ...] | None
) -> None:
    made = converted(content, mask=False)
    assert len(made.conversions) == len(told)
    assert all(said.startswith(word) for said, word in zip(made.conversions, told, strict=True))
    with Image.open(io.BytesIO(made.png)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)
        assert picture.size == (made.width, made.height) and not picture.info
        assert corner is None or picture.getpixel((0, 0)) == corner
    grey = converted(content, mask=True)
    with Image.open(io.BytesIO(grey.png)) as picture:
        assert (picture.mode, picture.size) == ("L", size)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 120, 240)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def wide(width: int, height: int) -> bytes:
    """A PNG whose header says so, without the pixels."""
    return png(width, height, 8, 2, b"")


def wide_webp(kind: bytes) -> bytes:
    side = (16_000).to_bytes(3, "little")
    body = {
        b"VP8X": b"\0" * 8 + side + side,
        b"VP8L": b"\0\0\0\0\x2f" + (15_999 | 15_999 << 14).to_bytes(4, "little") + b"\0" * 9,
        b"VP8 ": b"\0" * 10 + (16_000).to_bytes(2, "little") * 2,
    }[kind]
    return b"RIFF\x64\0\0\0WEBP" + kind + body + b"\0" * 8


LARGE = "at most 8192 pixels a side and 64 megapixels"
WHOLE = saved(Image.effect_noise((64, 64), 90).convert("RGB"), "PNG")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "an empty file; allowed: a PNG, JPEG or WebP"),
        (b"%PDF-1.7 and so on", "begins with b'%PDF-1.7'"),
        (saved(red(), "BMP"), "begins with b'BM"),
        (saved(red(), "TIFF"), "allowed: a PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "begins with b'<svg xml'"),
        (animated("GIF"), "an animated GIF; allowed: a still picture"),
        (animated("WEBP"), "an animated WEBP; allowed: a still picture"),
        (animated("PNG"), "an animated PNG; allowed: a still picture"),
        (WHOLE[: len(WHOLE) // 2], "broken or truncated"),
        (turned()[:-40], "broken or truncated"),
        (saved(red(), "WEBP")[:40], "broken or truncated|begins with b'RIFF"),
        (WHOLE[:60] + b"\xff" * 40 + WHOLE[100:], "broken or truncated"),
        (wide(8193, 8), f"8193x8 pixels; allowed: {LARGE}"),
        (wide(8100, 8100), f"8100x8100 pixels; allowed: {LARGE}"),
        (wide(60_000, 60_000), f"178 megapixels; allowed: {LARGE}"),
        (wide_webp(b"VP8X"), f"16001x16001 pixels; allowed: {LARGE}"),
        (wide_webp(b"VP8L"), f"16000x16000 pixels; allowed: {LARGE}"),
        (wide_webp(b"VP8 "), f"16000x16000 pixels; allowed: {LARGE}"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(content: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        converted(content, mask=False)
    assert [violation.field for violation in caught.value.violations] == ["data"]


def test_of_an_animation_two_pictures_are_looked_at_however_many_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    seek = GifImageFile._seek

    def counted(file: GifImageFile, frame: int, update_image: bool = True) -> None:
        looked.append(frame)
        seek(file, frame, update_image)

    monkeypatch.setattr(GifImageFile, "_seek", counted)
    head = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff"
    frame = b"\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    with pytest.raises(InvalidRequest, match="an animated GIF"):
        converted(head + frame * 1000 + b"\x3b", mask=False)
    assert len(looked) <= 4, looked


def test_cameras_put_previews_behind_a_jpeg() -> None:
    both = saved(red(), "MPO", save_all=True, append_images=[red()])
    assert converted(both, mask=False).conversions == ("the first of its 2 pictures",)


@pytest.mark.parametrize("make", [lambda: WHOLE, turned, lambda: saved(see_through(), "WEBP")])
def test_broken_files_are_refused_and_nothing_else_happens(make: Callable[[], bytes]) -> None:
    whole = make()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        for content in (whole[:at], whole[:at] + b"\x00\xff\x7f" + whole[at + 3 :]):
            try:
                made = converted(content, mask=False)
            except InvalidRequest:
                continue
            assert made.width * made.height <= pictures.PIXELS_MAX
