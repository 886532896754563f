"""What every worker did, as a chart: one row a worker, one colour a request. As text for a terminal
and as a page for a browser. Pure: stretches in, text out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rich.text import Text

from hocket.tracing.interruptions import DENOISERS, Interruption, InterruptionKind, Stretch

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
# Told apart on dark and on light grounds, also with the common kinds of colour blindness.
_COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#8c564b", "#999933"),
    *("#004488", "#dd8833", "#117755", "#777777"),
)
_PALE = {"text": 0.5, "vae": 0.65}  # by operation; what has steps is not
_PALE_ELSE = 0.6
_ROW_PX, _WIDTH_PX, _LABEL_PX, _TICK_PX = 34, 1120, 70, 22
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; color: #222 }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1.1rem }} svg {{ width: 100%; height: auto }}
td, th {{ padding: 2px 12px 2px 0; text-align: left }} th {{ font-weight: 600 }}
.key {{ display: inline-block; width: 1em; height: 1em }}
</style></head><body><h1>{title}</h1>{chart}
<table><tr><th></th><th>request</th><th>what</th></tr>{legend}</table>
<h2>Who was interrupted</h2><ul>{story}</ul>
<p>Pale: calls without steps, as encoding and decoding. Point at a piece to see its steps.</p>
</body></html>
"""


def letters(requests: Sequence[str]) -> dict[str, str]:
    """A letter for each request, in the order given; they repeat when they run out."""
    return {request: LETTERS[i % len(LETTERS)] for i, request in enumerate(requests)}


def order(found: Sequence[Stretch]) -> list[str]:
    """Requests by when they first ran."""
    return list(dict.fromkeys(s.request for s in found))


def chart(found: Sequence[Stretch], columns: int) -> list[Text]:
    """One line a worker and one with the time; a column shows who ran the longest in it."""
    if not found or columns < 1:
        return []
    start_ns, end_ns = _extent(found)
    requests = order(found)
    known = letters(requests)
    column_ns = (end_ns - start_ns) / columns
    lines = []
    for worker in _workers(found):
        shares: list[dict[str, float]] = [{} for _ in range(columns)]
        for stretch in found:
            if worker in stretch.workers:
                _share(shares, stretch, start_ns, column_ns)
        line = Text(f"{worker:>6} ")
        for share in shares:
            busiest = max(share, key=lambda r: share[r], default="")
            if share.get(busiest, 0.0) < 0.3 * column_ns:
                line.append("·", "dim")
            else:
                line.append(known[busiest], f"bold {_colour(requests.index(busiest))}")
        lines.append(line)
    seconds = (end_ns - start_ns) / 1e9
    ruler = f"{seconds:.1f} s".rjust(columns)
    lines.append(Text(f"{'':>6} 0{ruler[1:]}", "dim"))
    return lines


def told(interruption: Interruption, names: Mapping[str, str], start_ns: int) -> str:
    """One sentence about an interruption; `names` says what to call a request."""
    before, after = interruption.before, interruption.after
    at_s = (before.end_ns - start_ns) / 1e9
    who = names.get(interruption.request, interruption.request)
    for_whom = ", ".join(names.get(r, r) for r in interruption.overtakers)
    due = f" for {for_whom}" if for_whom else ""
    here, there = " ".join(before.workers), " ".join(after.workers)
    of_node = f" of {before.node}" if before.node != before.operation else ""
    head = f"{at_s:5.1f} s  {who} {interruption.kind} after step {before.last_step}{of_node}"
    if interruption.kind is InterruptionKind.PAUSED:
        back_s = (after.start_ns - start_ns) / 1e9
        return f"{head} [{here}]{due}; went on at {back_s:.1f} s x{len(after.workers)} [{there}]"
    return f"{head}, [{here}] to [{there}]{due}"


def page(
    title: str, found: Sequence[Stretch], happened: Sequence[Interruption], names: Mapping[str, str]
) -> str:
    """The chart as a page of its own, with a legend and what happened to whom."""
    requests = order(found)
    known = letters(requests)
    start_ns = _extent(found)[0] if found else 0
    legend = "".join(
        f'<tr><td><span class="key" style="background:{_colour(i)}"></span> {known[r]}</td>'
        f"<td><code>{escape(r)}</code></td><td>{escape(names.get(r, ''))}</td></tr>"
        for i, r in enumerate(requests)
    )
    story = "".join(f"<li>{escape(told(one, names, start_ns))}</li>" for one in happened)
    return _PAGE.format(
        title=escape(title), chart=_svg(found), legend=legend, story=story or "<li>nobody</li>"
    )


def _svg(found: Sequence[Stretch]) -> str:
    if not found:
        return "<p>Nothing ran.</p>"
    start_ns, end_ns = _extent(found)
    workers, requests = _workers(found), order(found)
    known = letters(requests)
    scale = (_WIDTH_PX - _LABEL_PX) / (end_ns - start_ns)
    height = len(workers) * _ROW_PX + _TICK_PX
    pieces = [f'<svg viewBox="0 0 {_WIDTH_PX} {height}" xmlns="http://www.w3.org/2000/svg">']
    for row, worker in enumerate(workers):
        y = row * _ROW_PX
        pieces.append(f'<text x="0" y="{y + 21}">{escape(worker)}</text>')
        pieces += [
            _piece(s, y, start_ns, scale, _colour(requests.index(s.request)), known[s.request])
            for s in found
            if worker in s.workers
        ]
    seconds = (end_ns - start_ns) / 1e9
    for tenth in range(11):
        x = _LABEL_PX + tenth * (_WIDTH_PX - _LABEL_PX) / 10
        anchor = "end" if tenth == 10 else "middle"
        label = f"{seconds * tenth / 10:.1f} s"
        place = f'x="{x:.0f}" y="{height - 5}" text-anchor="{anchor}"'
        pieces.append(f'<text {place} font-size="12">{label}</text>')
    return "".join([*pieces, "</svg>"])


def _piece(stretch: Stretch, y: int, start_ns: int, scale: float, colour: str, letter: str) -> str:
    x = _LABEL_PX + (stretch.start_ns - start_ns) * scale
    width = max(1.0, (stretch.end_ns - stretch.start_ns) * scale - 0.5)
    steps = f"steps {stretch.first_step}-{stretch.last_step}"
    tip = f"{stretch.request} {stretch.node} {steps} x{len(stretch.workers)}"
    place = f'x="{x + width / 2:.1f}" y="{y + 21}" text-anchor="middle"'
    mark = f'<text {place} fill="#fff">{letter}</text>' if width > 14 else ""
    return (
        f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW_PX - 8}" rx="2" '
        f'fill="{colour}" fill-opacity="{_opacity(stretch)}">'
        f"<title>{escape(tip)}</title></rect>{mark}"
    )


def _opacity(stretch: Stretch) -> float:
    if stretch.operation in DENOISERS:
        return 1.0
    return _PALE.get(stretch.operation, _PALE_ELSE)


def _share(
    shares: list[dict[str, float]], stretch: Stretch, start_ns: int, column_ns: float
) -> None:
    begin, end = (stretch.start_ns - start_ns) / column_ns, (stretch.end_ns - start_ns) / column_ns
    for column in range(int(begin), min(len(shares), int(end) + 1)):
        part = min(end, column + 1) - max(begin, column)
        mine = shares[column]
        mine[stretch.request] = mine.get(stretch.request, 0.0) + part * column_ns


def _extent(found: Sequence[Stretch]) -> tuple[int, int]:
    start_ns = min(s.start_ns for s in found)
    return start_ns, max(start_ns + 1, *(s.end_ns for s in found))


def _workers(found: Sequence[Stretch]) -> list[str]:
    return sorted({w for s in found for w in s.workers}, key=lambda w: (len(w), w))


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]
