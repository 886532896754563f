"""A figure to draw on, and the ways out: PNG, and SVG that follows the page's light or dark theme.

Figures are drawn in the light colours of `style.THEME`; in SVG each of these becomes a CSS variable
and text stays text. Output depends on the data alone: no dates, no random ids.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import THEME

PNG_DPI = 130
WIDTH_IN = 11.0
LABEL_PT = 8.5

_RC: Any = {  # matplotlib types the keys as literals
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": THEME["ink"][0],
    "axes.labelcolor": THEME["soft"][0],
    "axes.edgecolor": THEME["soft"][0],
    "axes.titlecolor": THEME["ink"][0],
    "xtick.color": THEME["soft"][0],
    "ytick.color": THEME["soft"][0],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "grid.color": THEME["grid"][0],
    "grid.linewidth": 0.8,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "hatch.linewidth": 0.6,
    "lines.solid_capstyle": "round",
}


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's defaults as the reports want them, while a figure is made."""
    with matplotlib.rc_context(_RC):
        yield


def facets(
    count: int, columns: int, height_in: float, share: tuple[bool, bool] = (False, True)
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows; `share`: x axes, y axes. Call it in `house_style`."""
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=share[0], sharey=share[1], squeeze=False)
    axes = [a for a in np.asarray(grid).flat if isinstance(a, Axes)]
    for spare in axes[count:]:
        spare.set_visible(False)
    for a in axes[:count]:
        a.tick_params(labelleft=True, labelbottom=True)
    return figure, axes[:count]


def end_labels(
    axes: Axes, ends: Sequence[tuple[str, float, float, str, bool]], height_in: float
) -> None:
    """Names lines at their right end: (name, x, y, colour, bold), apart enough to be read."""
    low, high = axes.get_ylim()
    gap = (LABEL_PT * 1.25) / (height_in * 72 * 0.72) * (high - low)
    ordered = sorted(ends, key=lambda end: end[2])
    places = _apart([y for _, _, y, _, _ in ordered], gap, low, high)
    right = axes.get_xlim()[1]
    for (name, x, y, colour, bold), place in zip(ordered, places, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(right, place),
            textcoords="data",
            annotation_clip=False,
            color=colour,
            fontsize=LABEL_PT + (0.5 if bold else 0),
            fontweight="bold" if bold else "normal",
            va="center",
            ha="left",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.5,
                "alpha": 0.6,
                "shrinkA": 0,
                "relpos": (0, 0.5),
            },
        )


def write_png(figure: Figure, path: Path) -> None:
    """On the light page's colour."""
    with matplotlib.rc_context(_RC):
        figure.savefig(
            path, format="png", dpi=PNG_DPI, facecolor=THEME["paper"][0], metadata={"Software": ""}
        )


def as_svg(figure: Figure, name: str, titles: Mapping[str, str] | None = None) -> str:
    """An <svg> element. `name` keeps ids apart; `titles`: hover text by an artist's gid."""
    out = io.StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg ([^>]*?)width="[^"]+"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]+"', r"<svg \1", text, count=1)
    if titles:

        def titled(found: re.Match[str]) -> str:
            title = titles.get(found[1])
            return found[0] + (f"<title>{html.escape(title)}</title>" if title else "")

        text = re.sub(r'<g id="([^"]+)">', titled, text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('xlink:href="#', f'xlink:href="#{name}-')
    text = text.replace("url(#", f"url(#{name}-")
    for variable, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{variable})")
    return re.sub(r"(font: [^;\"]*?px) [^;\"]+", r"\1 var(--font)", text).strip()


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, each near the one that is wanted, `gap` apart, within low and high
    where they all fit, else under high."""
    places = list(wanted)
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 0:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    limit = min(low, high - gap * (len(places) - 1))
    for i in range(len(places)):
        places[i] = max(places[i], limit)
        limit = places[i] + gap
    return places
