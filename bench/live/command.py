"""`python -m bench live`: a Case live and simulated, side by side.

Both run the same scheduler on the same requests, from the same profile. What is compared is what a
user sees: who was on time, and how long each request took. Where they differ, the simulator leaves
something out (moving, forming groups, the broker), or the profile is not of the machine as it is,
or the machine does not do the same thing twice. To tell these apart, the Case is simulated once
more with what calls took in the live runs themselves, and live runs are compared with each other.

    round 1    calibrate │ seed 0 │ seed 1 │ …      calibrations: other requests, whose times
    round 2    calibrate │ seed 0 │ seed 1 │ …      live and simulated runs start from
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress

from bench.live.compare import LiveComparison, Outcomes, compare, table
from bench.live.profile import live_profile
from bench.live.run import run_live
from bench.sim.case import Case, CaseError
from bench.sim.experiment import Experiment, RunSpec, load_experiment, parse_seeds
from bench.sim.trace import TraceRequest
from bench.sim_command import console, explained
from hocket.launching.machine import machine_kind
from hocket.tracing import gantt
from hocket.tracing.interruptions import interruptions, stretches
from hocket.tracing.span_file import SpanRecord, read_spans

EXECUTORS = ("torch", "emulated")


@dataclass(frozen=True)
class _Live:
    """A live run, and what its workers told."""

    case: Case
    outcomes: Outcomes
    spans: list[SpanRecord]

    @property
    def asked(self) -> dict[str, TraceRequest]:
        """What was asked for, by the name that traces know."""
        return {self.outcomes[t.id].name: t for t in self.case.trace}


@explained
def live_command(
    case: Annotated[Path, typer.Option(help="Case file (TOML).")],
    seeds: Annotated[str, typer.Option(help="0-4 or 3,5; default: the Case's own.")] = "",
    policies: Annotated[str, typer.Option(help="Policies or labels of the Case.")] = "",
    executor: Annotated[str, typer.Option(help="torch or emulated.")] = "torch",
    calibrate: Annotated[
        int | None,
        typer.Option(
            help="Seed of a live run before each round (in the next one, this plus one), whose "
            "times both start from."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds: live runs of each seed.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for figures and timelines.")] = None,
) -> None:
    """Runs a Case on a live mesh and in the simulator, and compares them."""
    if executor not in EXECUTORS:
        raise CaseError("--executor", executor, " or ".join(EXECUTORS))
    experiment = load_experiment(case)
    names = [p.strip() for p in policies.split(",") if p.strip()]
    runs = experiment.runs(parse_seeds(seeds or experiment.file.seeds), names)
    labels = [_label(spec, experiment) for spec in runs]
    calibrations: list[_Live] = []
    lives: list[list[_Live]] = [[] for _ in runs]
    with Progress(console=console, transient=True) as progress:
        for number in range(repeats):
            if calibrate is not None:
                first = msgspec.structs.replace(runs[0], seed=calibrate + number)
                said = f"calibrating, seed {first.seed}"
                calibrations.append(_live(first.to_case(), executor, said, progress))
            for spec, label, made in zip(runs, labels, lives, strict=True):
                planned = _measured(spec.to_case(), calibrations)
                said = f"{label}, seed {spec.seed}, round {number + 1} of {repeats}"
                made.append(_live(planned, executor, said, progress))
                progress.console.print(said, "done", highlight=False)
    found = []
    for spec, label, made in zip(runs, labels, lives, strict=True):
        planned = spec.to_case()
        outcomes = [live.outcomes for live in made]
        truths = (_measured(planned, calibrations), _measured(planned, made))
        found.append(compare(label, spec.seed, outcomes, *truths))
        console.print(found[-1].line, highlight=False)
        if out is not None:
            run_name = f"{label.replace(' ', '-').replace('=', '-')}-{spec.seed}"
            _draw(out / f"{run_name}.html", f"{spec.title}, {run_name}", made[0])
    console.print(table(found))
    if out is not None:
        command = f"python -m bench live --case {case} --executor {executor}"
        command += f" --seeds {seeds}" if seeds else ""
        command += f" --calibrate {calibrate}" if calibrate is not None else ""
        command += f" --repeats {repeats}" if repeats > 1 else ""
        command += f" --policies {policies}" if policies else ""
        _write(out, experiment.file.title, command, found)
        if calibrations:
            (out / "profile.csv").write_text(_measured(runs[0].to_case(), calibrations).profile_csv)
        console.print(f"written to {out}")


def _label(spec: RunSpec, experiment: Experiment) -> str:
    """The policy, and what its cell has of its own."""
    cells = experiment.cells()
    own = {k: v for cell in cells for k, v in cell.items() if spec.cell.get(k) == v}
    more = "".join(f" {k}={v}" for k, v in own.items()) if len(cells) > 1 else ""
    return spec.policy.shown + more


def _live(case: Case, executor: str, said: str, progress: Progress) -> _Live:
    task = progress.add_task(said, total=len(case.trace))

    def told(ended: int, _: int) -> None:
        progress.update(task, completed=ended)

    with tempfile.TemporaryDirectory(prefix="hocket-live-") as name:
        folder = Path(name)
        outcomes = asyncio.run(run_live(case, folder, executor, told))
        spans = list(read_spans(folder / "traces"))
    progress.remove_task(task)
    return _Live(case, outcomes, spans)


def _measured(case: Case, lives: Sequence[_Live]) -> Case:
    """The Case with what calls took in live runs; with none, as it is."""
    if not lives:
        return case
    spans = [span for live in lives for span in live.spans]
    asked = {name: item for live in lives for name, item in live.asked.items()}
    profile_csv, contention = live_profile(case.profile_csv, spans, asked)
    return msgspec.structs.replace(
        case,
        profile_csv=profile_csv,
        contention=contention if case.cluster.hosts == 1 else None,
    )


def _draw(path: Path, title: str, live: _Live) -> None:
    """What the workers did, of the requests of the trace."""
    sizes = {t.id: f"{t.model} {t.width}x{t.height}x{t.frames}" for t in live.case.trace}
    names = {o.name: f"{r}: {sizes[r]}" for r, o in live.outcomes.items() if o.name}
    pieces = [s for s in stretches(live.spans) if s.request in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gantt.page(title, pieces, interruptions(pieces), names))


def _write(out: Path, title: str, command: str, found: Sequence[LiveComparison]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title,
        "command": command,
        "machine": machine_kind(),
        "runs": [asdict(c) for c in found],
    }
    (out / "live.json").write_text(json.dumps(content, indent=2) + "\n")
