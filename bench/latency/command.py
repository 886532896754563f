"""`python -m bench latency`: how well calls are predicted, and how soon a slow worker is found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.latency.recording import (
    MACHINE,
    PROFILE,
    SLOW_WORKER,
    UNSEEN,
    Learning,
    Unseen,
    false_alarms,
    learn,
    leave_out,
    record,
    slow_from_us,
)
from bench.reporting.drawing import PNG_DPI, facets, house_style
from bench.reporting.statistics import mean_interval
from bench.reporting.style import THEME
from bench.sim.case import ASSETS
from bench.sim.experiment import parse_seeds
from control.scheduler.times.profile import Profile
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 150)
SHIPPED = ASSETS.parents[1] / "control" / "assets" / "profiles" / "hocket-emoji_cpu.csv"
NOISES = (0.02, 0.05, 0.1)
POLICIES = ("fixed-1", "hocket")
SLOWDOWN = 1.3
ALARM_STEPS = 2000
DEGREES: tuple[tuple[int, ...], ...] = ((1,), (1, 2, 4))
SHOWN_STEPS = 60  # of the curves


class LatencyRow(msgspec.Struct, frozen=True):
    """One policy and noise, over all seeds."""

    policy: str
    noise: float
    after_20: str  # median |error| at the unseen size from its 21st step on, %
    measured: str  # the same against each measured time, noise included, %
    known: str  # at profiled sizes, %
    untaught: str  # at the unseen size, by the profile alone, %
    covered: str  # steps within their safe quantile, %
    flagged: str  # the slow worker's own steps until flagged: median (largest)
    within_5: str  # share of seeds
    accused: str  # wrong accusations a run


def latency_command(
    seeds: Annotated[str, typer.Option(help="0-19 or 3,5.")] = "0-19",
    out: Annotated[Path, typer.Option(help="Folder for figures and curves.")] = Path(
        "bench/results/latency"
    ),
) -> None:
    """The latency model on recorded runs: an unseen size, one worker 30 % slower, noise.

    Under fixed-1, where each worker is measured by itself, and under hocket, where members of a
    group tell how much of a step was their own.
    """
    numbers = parse_seeds(seeds)
    found: dict[tuple[str, float], list[Learning]] = {}
    with console.status("recording") as status:
        for policy in POLICIES:
            for noise in NOISES:
                for seed in numbers:
                    status.update(f"{policy}, noise {noise:g}, seed {seed}")
                    steps = record(seed, noise, SLOWDOWN, policy)
                    found.setdefault((policy, noise), []).append(learn(steps, slow_from_us(seed)))
        status.update("steps without a slow worker")
        alarms = {
            (sigma, degrees): [false_alarms(sigma, s, ALARM_STEPS, degrees) for s in numbers]
            for sigma in (0.05, 0.1)
            for degrees in DEGREES
        }
        files = (*sorted((ASSETS / "profiles").glob("*.csv")), SHIPPED)
        unseen = [u for f in files for u in leave_out(f.stem, Profile.from_csv(f.read_text()))]
    rows = [_row(policy, noise, runs) for (policy, noise), runs in found.items()]
    out.mkdir(parents=True, exist_ok=True)
    with house_style():
        _curves(found, out / "curve.png")
    text = _report(rows, alarms, unseen, seeds)
    (out / "README.md").write_text(text, encoding="utf-8")
    _show("recorded runs", LatencyRow.__struct_fields__, rows)
    _show("left out", Unseen._fields, unseen)
    console.print(f"written to {out}/README.md and {out}/curve.png")


def _show(title: str, names: Sequence[str], rows: Sequence[LatencyRow | Unseen]) -> None:
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(str(value) for value in _values(row)))
    console.print(table)


def _row(policy: str, noise: float, runs: Sequence[Learning]) -> LatencyRow:
    flags = [run.flagged_at for run in runs]
    known = sorted(f for f in flags if f is not None)
    typical = f"{median(known):g} ({known[-1]})" if known else "never"
    soon = sum(f is not None and f <= 5 for f in flags)
    return LatencyRow(
        policy,
        noise,
        _percent([median(run.unseen[20:]) for run in runs if len(run.unseen) > 20]),
        _percent([median(run.measured[20:]) for run in runs if len(run.measured) > 20]),
        _percent([median(run.known) for run in runs]),
        _percent([median(run.untaught) for run in runs if run.untaught]),
        _percent([run.covered / run.steps for run in runs]),
        typical,
        f"{soon} of {len(runs)}, {len(known)} in all",
        f"{sum(run.accused for run in runs) / len(runs):.2f}",
    )


def _percent(samples: Sequence[float]) -> str:
    interval = mean_interval([100 * s for s in samples])
    return f"{interval.mean:.2f} ± {interval.half or 0.0:.2f}"


def _values(row: LatencyRow | Unseen) -> tuple[object, ...]:
    if isinstance(row, Unseen):
        return (*row[:3], f"{100 * row.relatives:.1f}", f"{100 * row.form:.1f}")
    return tuple(getattr(row, name) for name in row.__struct_fields__)


def _curves(found: dict[tuple[str, float], list[Learning]], path: Path) -> None:
    """Error at the unseen size step by step, and the slow worker's factor as it is believed."""
    figure, axes = facets(3, 3, 3.6, (False, False))
    left, *right = axes
    panels = ((left, "fixed-1", "unseen"), *zip(right, POLICIES, ("factors",) * 2, strict=True))
    for noise, colour in zip(NOISES, ("hocket", "edf", "tetriserve"), strict=True):
        ink = THEME[colour][0]
        for axis, policy, series in panels:
            lines = [getattr(run, series)[:SHOWN_STEPS] for run in found[policy, noise]]
            lines = [line for line in lines if len(line) == SHOWN_STEPS]
            low, middle, high = np.quantile(np.array(lines), (0.1, 0.5, 0.9), axis=0)
            scale = 100 if axis is left else 1
            steps = range(1, SHOWN_STEPS + 1)
            axis.fill_between(steps, scale * low, scale * high, color=ink, alpha=0.12, lw=0)
            axis.plot(steps, scale * middle, color=ink, label=f"noise {noise:.0%}")
    left.axhline(3.0, color=THEME["soft"][0], lw=0.8, ls=(0.0, (2, 3)))
    left.set_title(f"Error at {UNSEEN.width} px, of which no row tells, %")
    left.set_xlabel("steps at that size")
    left.set_ylim(0, 20)
    for axis, policy in zip(right, POLICIES, strict=True):
        axis.set_ylim(0.95, 1.45)
        axis.axhline(SLOWDOWN, color=THEME["soft"][0], lw=0.8, ls=(0.0, (2, 3)))
        axis.set_title(f"Factor believed of the slow worker, {policy}")
        axis.set_xlabel("its steps since it became slow")
    right[-1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=PNG_DPI)


def _report(
    rows: Sequence[LatencyRow],
    alarms: dict[tuple[float, tuple[int, ...]], list[int]],
    unseen: Sequence[Unseen],
    seeds: str,
) -> str:
    names = " | ".join(LatencyRow.__struct_fields__).replace("_", " ")
    lines = [
        "# The latency model, on line",
        "",
        f"`python -m bench latency --seeds {seeds}` on {machine_kind()} (nothing here depends on",
        "the machine's speed). Made by that command; means over seeds with 95 % intervals.",
        "",
        f"Recorded in the simulator: eight workers, `{PROFILE}`, 90 requests of four sizes; from a",
        f"third of the run on `{SLOW_WORKER}` takes {SLOWDOWN:g} times as long. The model that is",
        f"shown the recorded steps starts from a profile without the {UNSEEN.width} px rows, and",
        f"{MACHINE:g} times too fast. Errors are of the prediction made before a step was shown.",
        "",
        "![error over steps; factor over steps](curve.png)",
        "",
        "Curves: medians and the middle 80 % of seeds; the error under fixed-1.",
        "",
        f"| {names} |",
        "|" + " --- |" * len(LatencyRow.__struct_fields__),
        *(f"| {' | '.join(str(v) for v in _values(row))} |" for row in rows),
        "",
        "after 20: median error in % against the true median time; measured: against each measured",
        "time, so the noise itself is in it; covered: steps within their safe quantile (0.9);",
        "flagged: how many steps the slow worker took part in before it was flagged, median",
        "(largest). Under `hocket` most of its steps are those of a group, whose members tell how",
        "much of each was their own; these scatter by the same noise, each by itself. A step of a",
        "worker alone tells nothing where two others were not measured in its cell of late: hence",
        "the largest numbers under `fixed-1`.",
        "",
        f"## False alarms: {ALARM_STEPS} steps of eight equal workers, lognormal noise",
        "",
        "Members of a group tell their own times, which scatter by the same noise, each by itself.",
        "",
        "| noise | degrees | alarms in 1000 steps |",
        "| --- | --- | --- |",
    ]
    for (sigma, degrees), counts in alarms.items():
        rate = mean_interval([1000 * c / ALARM_STEPS for c in counts])
        shown = ", ".join(str(d) for d in degrees)
        lines.append(f"| {sigma:g} | {shown} | {rate.mean:.3f} ± {rate.half or 0.0:.3f} |")
    lines += [
        "",
        "## Cells left out of a profile, and estimated from the others",
        "",
        "Median error in %: by the nearest relatives alone (version 0), and as shipped.",
        "",
        "| profile | left out | cells | relatives | shipped |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(str(v) for v in _values(u))} |" for u in unseen),
    ]
    return "\n".join(lines) + "\n"
