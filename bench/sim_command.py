"""`python -m bench sim`, `trace` and `solver`: the simulator's command line.

sim --trace T --profile P --gpus N --policy NAME    one run: schedule log, summary
sim --case FILE --seeds 0-19 --out DIR              an experiment: DIR/runs.jsonl and its Case
sim --case FILE                                     a plain Case: its summary
solver --gpus N --requests R --rounds K             what a plan costs
trace NAME --set rate=12 --out T.jsonl              the requests of a workload
"""

from __future__ import annotations

import asyncio
import functools
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.beside import beside
from bench.sim.case import Case, CaseError, ClusterSpec, load_case
from bench.sim.costs import CostError, Costs
from bench.sim.experiment import check_models, load_experiment, parse_seeds, settings_of
from bench.sim.invariants import InvariantError
from bench.sim.loop import Result, run
from bench.sim.solver import measure_plans
from bench.sim.trace import TraceError, read_trace, write_trace
from bench.sim.workloads import generate
from bench.sweep import sweep
from control.scheduler.settings import SettingError, Settings, SettingValue
from control.scheduler.summary import percentile
from control.scheduler.times.profile import Profile, ProfileError
from hocket.clock import steady_ns
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 150)
P = ParamSpec("P")
BAD_INPUT = (
    CaseError,
    CostError,
    SettingError,
    TraceError,
    ProfileError,
    msgspec.ValidationError,
    tomllib.TOMLDecodeError,
    OSError,
)


def explained(command: Callable[P, None]) -> Callable[P, None]:
    """Bad input exits 2 with one line, a broken invariant 1, Ctrl-C 130."""

    @functools.wraps(command)
    def explaining(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BAD_INPUT as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except InvariantError as error:
            console.print(f"broken: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            console.print("interrupted; nothing was written")
            raise typer.Exit(130) from None

    return explaining


@explained
def sim_command(
    case: Annotated[Path | None, typer.Option(help="Case file (TOML).")] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of a Case, 0-19 or 3,5; default: its own.")
    ] = "",
    policies: Annotated[str, typer.Option(help="Policies or labels of the Case.")] = "",
    jobs: Annotated[int, typer.Option(help="Processes to use.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace (JSONL) of a single run.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile (CSV).")] = None,
    loads: Annotated[Path | None, typer.Option(help="Weights and load times (CSV).")] = None,
    gpus: Annotated[int, typer.Option(help="Number of workers.", min=1)] = 8,
    hosts: Annotated[int, typer.Option(help="Hosts of the workers.", min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="GPU kind, where the profile has several.")] = "",
    memory_mib: Annotated[int, typer.Option(help="Of a worker; 0: all models fit.", min=0)] = 0,
    policy: Annotated[str, typer.Option(help="Policy of a single run.")] = "tetriserve",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    group_change_us: Annotated[int, typer.Option(help="Cost of moving a job.")] = 0,
    group_cold_us: Annotated[int, typer.Option(help="Cost of a group's first run.")] = 0,
    noise: Annotated[float, typer.Option(help="Coefficient of variation of step times.")] = 0.0,
    report_delay_us: Annotated[int, typer.Option(help="Delay of each report.")] = 0,
    report_us: Annotated[int, typer.Option(help="Shorter steps share a report.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    schedule_log: Annotated[Path | None, typer.Option(help="Write the schedule log.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write the summary.")] = None,
    check: Annotated[bool, typer.Option(help="Check invariants at each event.")] = True,
    bounds: Annotated[bool, typer.Option(help="Also bound each trace (slower).")] = False,
    mip_seconds: Annotated[
        float, typer.Option(help="Time for each integer bound; 0: linear only.", min=0)
    ] = 0.0,
    resume: Annotated[bool, typer.Option(help="Keep the runs in --out.")] = False,
) -> None:
    """Runs the real scheduler in the simulator: a trace, a Case, or all runs of a Case."""
    if (case is None) == (trace is None):
        raise CaseError("--case", case, "a Case file or --trace, and not both")
    names = [p.strip() for p in policies.split(",") if p.strip()]
    if case is not None and out is not None:
        found = load_experiment(case)
        bounding_s = mip_seconds if bounds else None
        sweep(found, seeds, names, jobs, out, check, bounding_s, resume)
        return
    if case is not None:
        one = _only_case(case, seeds, names, check)
    else:
        assert trace is not None
        if profile is None:
            raise CaseError("--profile", profile, "a profile (CSV) for --trace")
        costs = Costs(
            group_change_us=group_change_us,
            group_cold_us=group_cold_us,
            noise=noise,
            report_delay_us=report_delay_us,
            report_us=report_us,
        )
        if gpus % hosts:
            raise CaseError("--gpus", gpus, f"a multiple of --hosts, {hosts}")
        one = _case_of(
            trace.read_text(),
            profile.read_text(),
            loads.read_text() if loads else "",
            ClusterSpec(workers=gpus // hosts, hosts=hosts, gpu=gpu, memory_mib=memory_mib),
            settings_of(policy, read_pairs(set_ or []), Settings(), costs),
            costs,
            seed,
        )
    begin_ns = steady_ns()
    result = run(one, timer=steady_ns, check=check, keep=False)
    _write_run(result, (steady_ns() - begin_ns) / 1e9, schedule_log, summary)


def _only_case(path: Path, seeds: str, names: list[str], check: bool) -> Case:
    """A plain Case, or the one run that is left of an experiment. Raises: CaseError."""
    experiment = load_experiment(path)
    if experiment.plain:
        return load_case(path)
    specs = experiment.runs(parse_seeds(seeds or experiment.file.seeds), names, check=check)
    if len(specs) != 1:
        raise CaseError("--out", None, f"a folder, for the {len(specs)} runs of {path.name}")
    return specs[0].to_case()


def read_pairs(pairs: list[str]) -> dict[str, SettingValue]:
    """`key=value` texts as a mapping. Raises: CaseError."""
    found: dict[str, SettingValue] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CaseError("--set", pair, "key=value")
        found[key.strip()] = value.strip()
    return found


def _case_of(
    trace: str,
    profile_csv: str,
    loads_csv: str,
    cluster: ClusterSpec,
    settings: Settings,
    costs: Costs,
    seed: int,
) -> Case:
    requests = read_trace(trace)
    cluster = cluster.completed(Profile.from_csv(profile_csv))
    check_models(requests, cluster)
    return Case(
        cluster=cluster,
        profile_csv=profile_csv,
        loads_csv=loads_csv,
        trace=requests,
        settings=settings,
        costs=costs,
        seed=seed,
    )


def _write_run(
    result: Result, wall_s: float, schedule_log: Path | None, summary: Path | None
) -> None:
    found = result.summary
    if schedule_log is not None:
        schedule_log.write_text(result.log.text())
    if summary is not None:
        summary.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    table = Table(
        "requests",
        "met",
        "attainment",
        "p50 s",
        "p99 s",
        "utilisation",
        "plans",
        "plan p99 ms",
        "wall s",
    )
    table.add_row(
        str(found.requests),
        str(found.met),
        f"{found.attainment:.4f}",
        f"{found.latency_s.p50:.2f}",
        f"{found.latency_s.p99:.2f}",
        f"{found.utilisation:.3f}",
        str(result.plan_count),
        f"{found.plan_ms.p99:.2f}",
        f"{wall_s:.2f}",
    )
    console.print(table)


# ---------------------------------------------------------------------------------- trace


@explained
def trace_command(
    workload: Annotated[str, typer.Argument(help="Name of the workload, as in a Case.")],
    out: Annotated[Path, typer.Option(help="Trace (JSONL) to write.")],
    seed: Annotated[int, typer.Option(help="Seed of arrivals and shapes.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the workload, repeatable.")
    ] = None,
) -> None:
    """Writes the requests of a workload, the same that a Case with this seed has."""
    requests = generate(
        workload, seed, {k: _value(str(v)) for k, v in read_pairs(set_ or []).items()}
    )
    out.write_text(write_trace(requests))
    span_s = requests[-1].arrival_us / 1e6 if requests else 0.0
    console.print(f"{len(requests)} requests in {span_s:.0f} s: {out}", soft_wrap=True)


def _value(text: str) -> object:
    """A number, truth value or list as in JSON; else the text itself."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


# ---------------------------------------------------------------------------------- solver


@explained
def solver_command(
    gpus: Annotated[int, typer.Option(help="Workers.", min=1)] = 8,
    requests: Annotated[int, typer.Option(help="Open requests at any time.", min=1)] = 50,
    rounds: Annotated[int, typer.Option(help="Plans to measure.", min=1)] = 200,
    policy: Annotated[str, typer.Option(help="Policy.")] = "hocket",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of shapes and deadlines.")] = 0,
    loop: Annotated[
        bool, typer.Option("--loop", help="Also measure delays of an event loop in the process.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures a plan: wall time and operations, by numbers of workers and open requests."""
    settings = settings_of(policy, read_pairs(set_ or []), Settings(), Costs())
    late_ms: list[float] = []

    def measure() -> Result:
        return measure_plans(gpus, requests, rounds, settings, seed, steady_ns)

    if loop:
        result, late_ms = asyncio.run(beside(measure))
    else:
        result = measure()
    plan_ms, operations = sorted(result.plan_ms), sorted(result.operations)
    figures = {
        "policy": policy,
        "gpus": gpus,
        "requests": requests,
        "plans": len(plan_ms),
        "p50_ms": percentile(plan_ms, 50),
        "p99_ms": percentile(plan_ms, 99),
        "max_ms": plan_ms[-1],
        "operations_p50": percentile(operations, 50),
        "operations_max": operations[-1],
    }
    if late_ms:
        figures["loop_late_p99_ms"] = percentile(sorted(late_ms), 99)
        figures["loop_late_max_ms"] = max(late_ms)
    table = Table(*(k.replace("_", " ") for k in figures))
    table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in figures.values()))
    console.print(table)
    if out is not None:
        text = {**figures, "machine": machine_kind()}
        out.write_bytes(msgspec.json.format(msgspec.json.encode(text), indent=2) + b"\n")
