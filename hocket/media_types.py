"""Media types of results: which ones a result can have, and what their files are called."""

from __future__ import annotations

from collections.abc import Mapping

PNG, WEBP, MP4 = "image/png", "image/webp", "video/mp4"
SUFFIXES: Mapping[str, str] = {PNG: ".png", WEBP: ".webp", MP4: ".mp4"}


def offered(frames: int) -> tuple[str, ...]:
    """Media types of a result of that many frames, the default one first."""
    return (PNG, WEBP) if frames <= 1 else (MP4, WEBP)


def of_suffix(suffix: str) -> str:
    """The media type of files called so; empty where there is none."""
    return next((name for name, known in SUFFIXES.items() if known == suffix.lower()), "")
