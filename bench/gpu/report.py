"""Lays out what `python -m bench gpu` has found so far: README.md and a profile CSV.

Ratios are means over pairs of steps made one right after the other, with Student's t intervals.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.reporting.statistics import mean_interval

HEADER = "model,gpu,node,width,height,frames,degree,batch,call_us,source"
Found = Mapping[str, Any]  # one line of a section's file


def write_report(folder: Path) -> None:
    """Writes README.md and profile.csv from the files in the folder."""
    device = json.loads((folder / "device.json").read_text())
    sections = {path.stem: _lines(path) for path in sorted(folder.glob("*.jsonl"))}
    cells = [found for lines in sections.values() for found in lines if "node" in found["cell"]]
    parts = [_head(device), _steps(cells), _decodes(cells)]
    parts.append(_groups(sections.get("groups", [])))
    parts.append(_layouts(sections.get("layouts", [])))
    if (folder / "mesh.json").exists():
        parts.append(_mesh(json.loads((folder / "mesh.json").read_text())))
    parts.append(_failures(sections, folder))
    (folder / "README.md").write_text("\n".join(part for part in parts if part))
    (folder / "profile.csv").write_text(profile_csv(cells, device))


def profile_csv(cells: Iterable[Found], device: Mapping[str, Any]) -> str:
    """As `control.scheduler.times.profile` reads it: what is run as written, on one GPU."""
    text = io.StringIO()
    text.write(HEADER + "\n")
    writer = csv.writer(text, lineterminator="\n")
    for found in cells:
        cell = found["cell"]
        if cell["compile"] == "off" and found.get("ours_us"):
            times = found["ours_us"]
            source = f"[M] random weights, median of {len(times)}; {_on(device)}"
            shape = (cell["width"], cell["height"], cell["frames"])
            call_us = int(median(times))
            key = (cell["model"], gpu_kind(device), cell["node"], *shape, 1, cell["batch"])
            writer.writerow((*key, call_us, source))
    return text.getvalue()


def gpu_kind(device: Mapping[str, Any]) -> str:
    """What profiles call the device: its model number, as workers derive it."""
    words = str(device["device"]).lower().split()
    return next((word for word in words if any(c.isdigit() for c in word)), words[0])


def _lines(path: Path) -> list[Found]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _on(device: Mapping[str, Any]) -> str:
    return f"{device['device']}, torch {device['torch']}, diffusers {device['diffusers']}"


def _head(device: Mapping[str, Any]) -> str:
    rows = [(key, value) for key, value in device.items() if key != "command"]
    return (
        "# Measured on a GPU\n\n"
        f"`python -m bench {device['command']}`. Weights are random (seeded); what a step costs "
        "depends on shapes and\ndtypes alone. One run of one machine.\n\n"
        + _table(("fact", "value"), rows)
    )


def _steps(cells: Sequence[Found]) -> str:
    rows = []
    for found in cells:
        cell = found["cell"]
        if cell["node"] != "dit":
            continue
        head = (cell["model"], cell["shape"], cell["batch"], cell["compile"])
        if not found.get("ours_us"):
            rows.append((*head, _why_not(found), "", "", "", "", ""))
            continue
        pairs = list(zip(found["ours_us"], found["plain_us"], strict=True))
        ratio = mean_interval([ours / plain for ours, plain in pairs])
        rows.append(
            (
                *head,
                f"{median(found['ours_us']) / 1000:.2f}",
                f"{median(found['plain_us']) / 1000:.2f}",
                f"{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), n {ratio.n}",
                f"{found['first_us'] / 1e6:.1f}",
                f"{found['peak_bytes'] / 2**30:.1f}",
                f"{found['difference']:.2g} of {found['scale']:.2g}"
                + ("" if found["finite"] else ", NOT FINITE"),
            )
        )
    if not rows:
        return ""
    names = ("model", "shape", "batch", "compile", "ours ms", "plain ms", "ours / plain (95 %)")
    return (
        "## One step, against the plain diffusers loop\n\n"
        "The same jobs on the same weights, in alternating pairs, by CUDA events; `plain` has none "
        "of our hooks.\n`first` is the first step, compilation included; `peak` is ours, weights "
        "included; `apart` is the largest\ndifference of the latents behind the last step. With "
        "guidance a Wan step is two forwards.\n\n"
        + _table((*names, "first s", "peak GiB", "apart"), rows)
    )


def _why_not(found: Found) -> str:
    if found.get("out_of_memory"):
        return "out of memory" if found["tried"] else "not tried: a smaller batch did not fit"
    return f"failed: {found.get('error', '')[:80]}"


def _decodes(cells: Sequence[Found]) -> str:
    rows = [
        (
            found["cell"]["model"],
            found["cell"]["shape"],
            f"{median(found['ours_us']) / 1000:.1f}" if "ours_us" in found else _why_not(found),
            f"{found.get('peak_bytes', 0) / 2**30:.1f}",
        )
        for found in cells
        if found["cell"]["node"] == "vae"
    ]
    title = "## Decoding, the transformer's weights beside it\n\n"
    return title + _table(("model", "shape", "ms", "peak GiB"), rows) if rows else ""


def _groups(lines: Sequence[Found]) -> str:
    rows = []
    for found in lines:
        for key, times in found.items():
            if key.endswith("_us") and times:
                first, rest = times[0] / 1000, sorted(times[1:] or times)
                what = key.removesuffix("_us").replace("_", " ")
                rows.append(
                    (found["cell"]["members"], what, f"{first:.2f}", f"{median(rest) / 1000:.3f}")
                )
    note = (
        "Milliseconds. Of one member: `form` makes a communicator, `first` and `next` are its "
        "first collectives.\nOf several: `cold` forms a group and passes a word, `warm` looks it "
        "up, `exchange` is an all-to-all of 4 MiB.\n\n"
    )
    if not rows:
        return ""
    return "## Communicators\n\n" + note + _table(("members", "what", "first", "then"), rows)


def _layouts(lines: Sequence[Found]) -> str:
    rows = []
    for found in lines:
        cell = found["cell"]
        head = (cell["members"], f"{cell['ulysses']} x {cell['ring']}", cell["attention"])
        if "ours_us" not in found:
            rows.append((*head, _why_not(found), "", "", ""))
            continue
        ours, alone = median(found["ours_us"]), median(found["alone_us"])
        apart = f"{found['difference']:.2g} of {found['scale']:.2g}"
        speed = f"{alone / ours:.2f}"
        rows.append((*head, found["shape"], f"{ours / 1000:.2f}", speed, apart))
    names = ("members", "ulysses x ring", "attention", "shape", "ms", "speed-up", "apart")
    return "## Layouts, a GPU a member\n\n" + _table(names, rows) if rows else ""


def _mesh(found: Mapping[str, Any]) -> str:
    requests = found["requests"]
    rows = []
    for side in sorted({r["side"] for r in requests}):
        of_side = [r for r in requests if r["side"] == side]
        late = sorted(r["latency_s"] for r in of_side if r["outcome"] == "finished")
        rows.append(
            (
                f"{side} px",
                len(of_side),
                f"{found['alone_s'][str(side)]:.2f}",
                f"{median(late):.2f}" if late else "",
                f"{late[-1]:.2f}" if late else "",
                f"{sum(r['met'] for r in of_side) / len(of_side):.0%}",
            )
        )
    note = (
        f"{found['workers']} workers on this machine's GPUs, {found['steps']} steps, Poisson "
        f"arrivals at {found['load']:.0%} of what they do alone, seed\n{found['seed']}; deadlines "
        f"are {found['slack']:g} times what a size takes alone. A Flux of 2.8 billion random "
        "parameters.\n\n"
    )
    names = ("size", "requests", "alone s", "median s", "slowest s", "in time")
    return "## The whole mesh, mixed sizes\n\n" + note + _table(names, rows)


def _failures(sections: Mapping[str, Sequence[Found]], folder: Path) -> str:
    rows = [
        (name, " ".join(map(str, found["cell"].values())), found["error"])
        for name, lines in sections.items()
        for found in lines
        if "error" in found
    ]
    rows += [(log.stem, "", f"see {log.name}") for log in sorted(folder.glob("*.log"))]
    return "## Failed\n\n" + _table(("section", "cell", "why"), rows) if rows else ""


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
