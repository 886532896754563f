"""Colours and words of the reports.

A policy has one colour in every chart: one hue a family, a dash for each of its members. Charts are
drawn in the light colours; in HTML each of these becomes a CSS variable, which the dark theme sets
anew. hocket alone has the strong hue and the thick line.
"""

from __future__ import annotations

from typing import NamedTuple

from .rows import Cell, Value

Dash = tuple[float, tuple[float, ...]]
SOLID: Dash = (0.0, ())
DASHES: tuple[Dash, ...] = (SOLID, (0.0, (5, 2)), (0.0, (1.5, 1.8)), (0.0, (6, 2, 1.5, 2)))

# Name of the CSS variable: (light, dark).
THEME = {
    "ink": ("#1a1c22", "#eceef2"),
    "soft": ("#5b6170", "#a3a9b8"),
    "grid": ("#e3e5eb", "#2f333d"),
    "paper": ("#fefefe", "#15171c"),
    "panel": ("#f5f6f9", "#1d2027"),
    "good": ("#12794a", "#4cc38a"),
    "bad": ("#b4232a", "#ff7b7b"),
    "hocket": ("#d3372c", "#ff6a5b"),
    "edf": ("#1f6fb4", "#5aa9ea"),
    "tetriserve": ("#2d8a4e", "#5cc27f"),
    "genserve": ("#8250c4", "#b48cf0"),
    "diflow": ("#b7791f", "#e3ad55"),
    "disagfusion": ("#0f8b8d", "#44c4c6"),
    "shortest": ("#b84a8c", "#ec85bf"),
    "resolution": ("#6b7f2a", "#a9c057"),
    "fixed": ("#7d8596", "#8f97a9"),
    "static": ("#9a7b63", "#c2a48b"),
    "bound": ("#3c3f49", "#c9cdd8"),
}

# Family and dash of each policy.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "hocket": ("hocket",),
    "edf": ("edf", "edf-greedy"),
    "tetriserve": ("tetriserve",),
    "genserve": ("genserve",),
    "diflow": ("diflow",),
    "disagfusion": ("disagfusion",),
    "shortest": ("srtf", "sjf"),
    "resolution": ("rssp", "rasp"),
    "fixed": ("fixed-1", "fixed-2", "fixed-4", "fixed-8"),
    "static": ("diffusers", "diffusers-c", "diffusers-s", "monolith"),
}
_SPARE = ("shortest", "resolution", "diflow", "disagfusion", "static")

AXES = {
    "rate": "Request rate (requests a minute)",
    "per_second": "Request rate (requests a second)",
    "slo_s": "SLO (s)",
    "slo_scale": "SLO scale (× the base SLO)",
    "scale": "Request scale (× the base rate)",
    "request_scale": "Request scale (× the base rate)",
    "burst_factor": "Burst factor (× the base rate)",
    "burst": "Burst factor (× the base rate)",
    "gpus": "GPUs",
    "noise": "Step noise (coefficient of variation)",
    "group_change_us": "Cost of a group change (µs)",
    "group_cold_us": "Cost of a cold group (µs)",
}
NAMES = {"slo_scale": "SLO scale", "burst_factor": "burst factor", "request_scale": "scale"}


class Look(NamedTuple):
    """How a series is drawn."""

    family: str  # a name of THEME
    dash: Dash
    prominent: bool

    @property
    def colour(self) -> str:
        """In the light theme."""
        return THEME[self.family][0]


def looks(series: tuple[str, ...], policies: dict[str, str], baseline: str) -> dict[str, Look]:
    """A look for every series; several series of one policy differ in the dash."""
    found: dict[str, Look] = {}
    seen: dict[str, int] = {}
    for name in series:
        policy = policies.get(name, name)
        family, dash = _family(policy)
        dash += seen.get(policy, 0)
        seen[policy] = seen.get(policy, 0) + 1
        found[name] = Look(family, DASHES[dash % len(DASHES)], name == baseline)
    return found


def axis_title(name: str) -> str:
    """Of a swept value, with its unit."""
    return AXES.get(name, name.replace("_", " ").capitalize())


def in_sentence(name: str) -> str:
    """The axis title with a small first letter, where that is a word."""
    title = axis_title(name)
    return title if title[:2].isupper() else title[0].lower() + title[1:]


def cell_title(cell: Cell, names: tuple[str, ...] | None = None) -> str:
    """A cell in words, names first, or those of its values that are named."""
    ordered = sorted(cell, key=lambda item: not isinstance(item[1], str))
    parts = [_words(k, v) for k, v in ordered if names is None or k in names]
    return " · ".join(parts) if parts else "all runs"


def _words(name: str, value: Value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return name.replace("_", " ") if value else f"no {name.replace('_', ' ')}"
    return f"{NAMES.get(name, name.replace('_', ' '))} {value:g}"


def _family(policy: str) -> tuple[str, int]:
    for family, members in _FAMILIES.items():
        if policy in members:
            return family, members.index(policy)
    place = sum(policy.encode()) % len(_SPARE)
    return _SPARE[place], 1
