"""`python -m bench live`: a Case live and simulated, side by side.

Both run the same scheduler on the same requests, from the same profile. What is compared is what a
user sees: who was on time, and how long each request took. Where they differ, the simulator leaves
something out (moving, forming groups, the broker) or the profile is not of the machine as it is. To
tell the two apart, the Case is simulated once more with what calls took in the live run itself.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress
from rich.table import Table

from bench.live_profile import live_profile
from bench.live_run import Outcome, run_live
from bench.reporting.statistics import mean_interval
from bench.sim.case import Case, CaseError
from bench.sim.experiment import Experiment, RunSpec, load_experiment, parse_seeds
from bench.sim.loop import run
from bench.sim_command import console, explained
from control.scheduler.schedule_log import DoneLine
from control.scheduler.summary import percentile
from hocket import gantt
from hocket.interruptions import interruptions, stretches
from hocket.machine import machine_kind
from hocket.span_file import read_spans

EXECUTORS = ("torch", "emulated")


@dataclass(frozen=True)
class Compared:
    """A run of both kinds. Errors are |live - simulated| / simulated of requests done in both."""

    policy: str
    seed: int
    requests: int
    live_attainment: float
    sim_attainment: float
    error_p50: float
    error_p90: float
    bias_p50: float  # with its sign: above 0, live took longer
    live_latency_s: float  # p50
    sim_latency_s: float
    problems: int  # requests that were refused or failed
    # Simulated with the times that calls took in this very run, however fast the machine just was:
    own_attainment: float = 0.0
    own_error_p50: float = 0.0

    @property
    def points(self) -> float:
        """Attainment live over simulated, in points."""
        return 100 * (self.live_attainment - self.sim_attainment)

    @property
    def own_points(self) -> float:
        """The same, with the run's own times."""
        return 100 * (self.live_attainment - self.own_attainment)


@explained
def live_command(
    case: Annotated[Path, typer.Option(help="Case file (TOML).")],
    seeds: Annotated[str, typer.Option(help="0-4 or 3,5; default: the Case's own.")] = "",
    policies: Annotated[str, typer.Option(help="Labels or names out of the Case.")] = "",
    executor: Annotated[str, typer.Option(help="torch or emulated.")] = "torch",
    calibrate: Annotated[
        int | None, typer.Option(help="Seed of a live run before, whose times both start from.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for figures and timelines.")] = None,
) -> None:
    """Runs a Case on a live mesh and in the simulator, and compares them."""
    if executor not in EXECUTORS:
        raise CaseError("--executor", executor, " or ".join(EXECUTORS))
    experiment = load_experiment(case)
    names = [p.strip() for p in policies.split(",") if p.strip()]
    runs = experiment.runs(parse_seeds(seeds or experiment.file.seeds), names)
    several = len(experiment.cells()) > 1
    found: list[Compared] = []
    with Progress(console=console, transient=True) as progress:
        if calibrate is not None:
            runs = _calibrated(runs, calibrate, executor, out, progress)
        for spec in runs:
            found.append(_both(spec, _label(spec, experiment, several), executor, out, progress))
            progress.console.print(_line(found[-1]), highlight=False)
    console.print(table(found))
    if out is not None:
        command = f"python -m bench live --case {case} --executor {executor}"
        command += f" --seeds {seeds}" if seeds else ""
        command += f" --calibrate {calibrate}" if calibrate is not None else ""
        command += f" --policies {policies}" if policies else ""
        _write(out, experiment.file.title, command, found)
        console.print(f"written to {out}")


def compare(policy: str, seed: int, case: Case, live: dict[str, Outcome]) -> Compared:
    """Runs the simulator and sets its outcomes beside the live ones."""
    result = run(case)
    finish_us = {x.request: x.finish_us for x in result.log.lines() if isinstance(x, DoneLine)}
    sim_us = {t.id: finish_us[t.id] - t.arrival_us for t in case.trace if t.id in finish_us}
    live_us = {r: o.latency_us for r, o in live.items() if o.latency_us is not None}
    biases = [live_us[r] / sim_us[r] - 1 for r in sim_us if r in live_us]
    errors = sorted(abs(bias) for bias in biases)
    return Compared(
        policy=policy,
        seed=seed,
        requests=len(case.trace),
        live_attainment=sum(o.on_time for o in live.values()) / len(case.trace),
        sim_attainment=result.summary.attainment,
        error_p50=percentile(errors, 50),
        error_p90=percentile(errors, 90),
        bias_p50=median(biases) if biases else 0.0,
        live_latency_s=median(live_us.values()) / 1e6 if live_us else 0.0,
        sim_latency_s=result.summary.latency_s.p50,
        problems=sum(o.latency_us is None for o in live.values()),
    )


def table(found: Sequence[Compared]) -> Table:
    """One row a policy, means over seeds with 95 % intervals."""
    shown = Table(
        *("policy", "seeds", "requests", "on time live %", "simulated %", "difference, points"),
        *("error p50 %", "error p90 %", "bias p50 %", "latency p50 live s", "simulated s"),
        *("own times: difference, points", "error p50 %"),
        title="live against simulated",
    )
    for policy in dict.fromkeys(c.policy for c in found):
        rows = [c for c in found if c.policy == policy]
        shown.add_row(
            policy,
            str(len(rows)),
            str(sum(c.requests for c in rows)),
            _mean([100 * c.live_attainment for c in rows]),
            _mean([100 * c.sim_attainment for c in rows]),
            _mean([c.points for c in rows]),
            _mean([100 * c.error_p50 for c in rows]),
            _mean([100 * c.error_p90 for c in rows]),
            _mean([100 * c.bias_p50 for c in rows]),
            _mean([c.live_latency_s for c in rows], 2),
            _mean([c.sim_latency_s for c in rows], 2),
            _mean([c.own_points for c in rows]),
            _mean([100 * c.own_error_p50 for c in rows]),
        )
    return shown


def _label(spec: RunSpec, experiment: Experiment, several: bool) -> str:
    """The policy, and what its cell has of its own."""
    own = {k: v for cell in experiment.cells() for k, v in cell.items() if spec.cell.get(k) == v}
    return spec.policy.shown + ("".join(f" {k}={v}" for k, v in own.items()) if several else "")


def _calibrated(
    runs: list[RunSpec], seed: int, executor: str, out: Path | None, progress: Progress
) -> list[RunSpec]:
    """The runs with a profile out of a live run of the first one's Case, with another seed."""
    planned = msgspec.structs.replace(runs[0], seed=seed).to_case()
    task = progress.add_task(f"calibrating, seed {seed}", total=len(planned.trace))
    with tempfile.TemporaryDirectory(prefix="hocket-live-") as name:
        folder = Path(name)
        live = asyncio.run(
            run_live(planned, folder, executor, lambda n, _: progress.update(task, completed=n))
        )
        profile_csv = _times_of(planned, live, folder)
    progress.remove_task(task)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "profile.csv").write_text(profile_csv)
    return [msgspec.structs.replace(spec, profile_csv=profile_csv) for spec in runs]


def _both(
    spec: RunSpec, label: str, executor: str, out: Path | None, progress: Progress
) -> Compared:
    planned = spec.to_case()
    task = progress.add_task(f"{label}, seed {spec.seed}", total=len(planned.trace))
    with tempfile.TemporaryDirectory(prefix="hocket-live-") as name:
        folder = Path(name)

        def told(ended: int, _: int) -> None:
            progress.update(task, completed=ended)

        live = asyncio.run(run_live(planned, folder, executor, told))
        if out is not None:
            run_name = f"{label.replace(' ', '-').replace('=', '-')}-{spec.seed}"
            _draw(folder, out / f"{run_name}.html", f"{spec.title}, {run_name}", planned, live)
        own_csv = _times_of(planned, live, folder)
    progress.remove_task(task)
    own = compare(label, spec.seed, msgspec.structs.replace(planned, profile_csv=own_csv), live)
    return replace(
        compare(label, spec.seed, planned, live),
        own_attainment=own.sim_attainment,
        own_error_p50=own.error_p50,
    )


def _times_of(case: Case, live: dict[str, Outcome], folder: Path) -> str:
    """The Case's profile with what calls took in a live run of it."""
    asked = {live[t.id].name: t for t in case.trace}
    return live_profile(case.profile_csv, read_spans(folder / "traces"), asked)


def _draw(folder: Path, path: Path, title: str, case: Case, live: dict[str, Outcome]) -> None:
    """What the workers did, of the requests of the trace."""
    sizes = {t.id: f"{t.model} {t.width}x{t.height}x{t.frames}" for t in case.trace}
    names = {o.name: f"{r}: {sizes[r]}" for r, o in live.items() if o.name}
    pieces = [s for s in stretches(read_spans(folder / "traces")) if s.request in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gantt.page(title, pieces, interruptions(pieces), names))


def _line(c: Compared) -> str:
    return (
        f"{c.policy} seed {c.seed}: on time {100 * c.live_attainment:.1f} % live, "
        f"{100 * c.sim_attainment:.1f} % simulated; error p50 {100 * c.error_p50:.1f} %, "
        f"p90 {100 * c.error_p90:.1f} %, bias {100 * c.bias_p50:+.1f} %; with the run's own times "
        f"{100 * c.own_attainment:.1f} %, {100 * c.own_error_p50:.1f} %"
        + (f"; {c.problems} refused or failed" if c.problems else "")
    )


def _mean(values: Sequence[float], digits: int = 1) -> str:
    interval = mean_interval(values)
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def _write(out: Path, title: str, command: str, found: Sequence[Compared]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        "command": command,
        "machine": machine_kind(),
        "runs": [asdict(c) for c in found],
    }
    (out / "live.json").write_text(json.dumps(content, indent=2) + "\n")
