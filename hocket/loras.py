"""LoRA adapters that a request names: "style", or with a scale "style:0.8".

Shared by gateways, control, workers and the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COUNT_MAX = 8
SCALE_MAX = 4.0
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,127}")
_SCALE = re.compile(r"[-+]?[0-9]{1,3}(\.[0-9]{0,12})?")
NAMED_SO = "1 to 128 of A-Z a-z 0-9 . _ + -, a letter or digit first"
_SO = f'"name" or "name:scale", a scale of -{SCALE_MAX:g} to {SCALE_MAX:g}'


class Lora(NamedTuple):
    """An adapter, and what it is multiplied by."""

    name: str
    scale: float = 1.0


def parsed(text: str) -> Lora | None:
    """What a text names; None where it names none, or a scale that cannot be."""
    name, colon, said = text.partition(":")
    if not is_name(name) or (colon and not _SCALE.fullmatch(said)):
        return None
    scale = float(said) if colon else 1.0
    return Lora(name, scale) if abs(scale) <= SCALE_MAX else None


def is_name(name: str) -> bool:
    """Whether requests can name an adapter so."""
    return _NAME.fullmatch(name) is not None


def faults(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The places of what is wrong in a request's list, each with what is allowed there."""
    seen: set[str] = set()
    for number, text in enumerate(texts):
        lora = parsed(text)
        if number >= COUNT_MAX:
            yield number, f"at most {COUNT_MAX} adapters"
            return
        if lora is None:
            yield number, _SO
        elif lora.name in seen:
            yield number, "each adapter once"
        else:
            seen.add(lora.name)
