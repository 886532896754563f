"""One self-contained HTML page: styles, tables, figures. Well-formed XML, no script or resource."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .style import THEME
from .tables import ReportTable

_KIND = {True: "w", False: "n"}  # words, numbers
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1180px; margin: 0 auto; padding: 36px 28px 80px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 6px; }
h3 { font-size: 15px; margin: 26px 0 6px; }
p, figcaption { max-width: 78ch; }
p.lead { color: var(--soft); margin: 0 0 18px; }
figure { margin: 12px 0 8px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .note { color: var(--soft); font-size: 13.5px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 8px; }
.tile { background: var(--panel); border-radius: 8px; padding: 14px 18px; flex: 1 1 190px; }
.tile b { display: block; font-size: 25px; line-height: 1.2; font-weight: 650; }
.tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0; min-width: 50%; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; max-width: 9em; }
th.w, td.w { text-align: left; }
td.w:last-child { white-space: normal; }
thead th { border-bottom: 1px solid var(--soft); }
tbody td { border-bottom: 1px solid var(--grid); }
tr.strong td { font-weight: 650; background: var(--panel); }
tr.strong td:first-child { color: var(--hocket); }
td.good { color: var(--good); }
td.bad { color: var(--bad); }
pre { background: var(--panel); border-radius: 8px; padding: 12px 16px; overflow-x: auto; }
pre { font-size: 13px; white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
a { color: inherit; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole page; `body`: elements, already escaped."""
    light = "".join(f"--{name}: {light};" for name, (light, _) in THEME.items())
    dark = "".join(f"--{name}: {dark};" for name, (_, dark) in THEME.items())
    style = (
        f":root {{ color-scheme: light dark; --font: {FONT}; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_RULES}"
    )
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">\n<head>\n'
        '<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(level: int, text: str) -> str:
    return f"<h{level}>{html.escape(text, quote=False)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{html.escape(text, quote=False)}</p>"


def code(text: str) -> str:
    return f"<pre>{html.escape(text, quote=False)}</pre>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Headline numbers: (number, what it is)."""
    every = "".join(
        f'<div class="tile"><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>'
        for n, what in figures
    )
    return f'<div class="tiles">{every}</div>'


def drawn(svg: str, caption: str) -> str:
    """A figure with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption, quote=False)}</figcaption></figure>"


def folded(summary: str, body: str, is_open: bool = False) -> str:
    mark = ' open="open"' if is_open else ""
    return f"<details{mark}><summary>{html.escape(summary)}</summary>{body}</details>"


def tabled(table: ReportTable) -> str:
    """A table that scrolls where it is too wide."""
    words = table.words
    heads = "".join(
        f'<th class="{_KIND[w]}">{html.escape(h)}</th>'
        for h, w in zip(table.heads, words, strict=True)
    )
    rows = []
    for place, row in enumerate(table.rows):
        fields = []
        for entry, is_word in zip(row, words, strict=True):
            kinds = " ".join(k for k in ("w" if is_word else "", entry.tone) if k)
            mark = f' class="{kinds}"' if kinds else ""
            fields.append(f"<td{mark}>{html.escape(entry.text, quote=False)}</td>")
        mark = ' class="strong"' if place in table.strong else ""
        rows.append(f"<tr{mark}>{''.join(fields)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
