"""`python -m bench bound`: the attainment that no schedule can exceed, clairvoyant or not.

Three bounds, each at least as tight as the one before: `alone` (requests that could meet their
deadline with the whole cluster to themselves), `linear` (the relaxation of
`bench.bounding.relaxation`, certified), `integer` (the same where a request counts wholly or not at
all). Loads, moving costs and batch partners are free here, so the bound is optimistic about them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.bounding.demand import UnknownDemand, demands
from bench.sim.trace import TraceError, TraceRequest, read_trace
from control.scheduler.times.profile import Profile, ProfileError

VARIABLES_MAX = 60_000
MIP_SECONDS = 20.0


class AttainmentBound(msgspec.Struct, frozen=True, kw_only=True):
    """Upper bounds on attainment, 0..1, of one trace on one cluster."""

    requests: int
    alone: float
    linear: float
    integer: float | None = None  # None: not asked for, or the linear one is whole already
    integer_optimal: bool = False  # False: time ran out, still a bound
    bound: float  # the tightest, rounded down to a whole number of requests
    intervals: int = 0  # of the time grid
    variables: int = 0


def bound(
    trace: Sequence[TraceRequest],
    profile_csv: str,
    gpus: int,
    *,
    tolerance: float = 0.0,
    mip_seconds: float = MIP_SECONDS,
    variables_max: int = VARIABLES_MAX,
) -> AttainmentBound:
    """Bounds the attainment of any schedule of `trace` on `gpus` equal GPUs.

    Args:
        tolerance: Share by which calls may be faster than the profile's text says.
        mip_seconds: Time limit of the integer bound; 0 leaves it out. The other bounds do not
            depend on the machine's speed, this one does when the limit is reached.
        variables_max: Size limit of the relaxation; a smaller one coarsens time, and loosens.

    Raises:
        UnknownDemand: a request's steps are not in the profile. ProfileError: it is no profile.
    """
    # Optional (the `bench` extra) and slow to import.
    from bench.bounding.relaxation import cuts, programme  # noqa: PLC0415
    from bench.bounding.solving import solve_linear, solve_whole  # noqa: PLC0415

    every = demands(trace, Profile.from_csv(profile_csv), gpus, tolerance)
    able = [d for d in every if d.feasible_alone]
    total = max(1, len(every))
    if not able:
        return AttainmentBound(requests=len(every), alone=0.0, linear=0.0, bound=0.0)
    grid = cuts(able, variables_max)
    relaxation = programme(able, gpus, grid)
    linear = solve_linear(relaxation)
    met = math.floor(linear.certified + 1e-6)
    whole = None
    if mip_seconds > 0 and not linear.whole:
        whole = solve_whole(relaxation, mip_seconds)
    if whole is not None:
        met = min(met, math.floor(whole.bounded + 1e-4))
    return AttainmentBound(
        requests=len(every),
        alone=len(able) / total,
        linear=linear.certified / total,
        integer=None if whole is None else whole.bounded / total,
        integer_optimal=whole is not None and whole.optimal,
        bound=met / total,
        intervals=len(grid) - 1,
        variables=len(relaxation.upper),
    )


def bound_command(
    trace: Annotated[Path, typer.Option(help="Trace (JSONL).", exists=True, dir_okay=False)],
    profile: Annotated[Path, typer.Option(help="Profile (CSV).", exists=True, dir_okay=False)],
    gpus: Annotated[int, typer.Option(help="GPUs of the cluster.", min=1)],
    mip_seconds: Annotated[
        float, typer.Option(help="Time limit of the integer bound; 0: linear only.", min=0)
    ] = MIP_SECONDS,
    variables_max: Annotated[
        int, typer.Option(help="Size limit of the relaxation.", min=1000)
    ] = VARIABLES_MAX,
    tolerance: Annotated[
        float, typer.Option(help="Share by which calls may beat the profile.", min=0, max=0.5)
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """The attainment that no schedule of a trace can exceed, clairvoyant or not."""
    console = Console()
    try:
        found = bound(
            read_trace(trace.read_text()),
            profile.read_text(),
            gpus,
            tolerance=tolerance,
            mip_seconds=mip_seconds,
            variables_max=variables_max,
        )
    except (TraceError, ProfileError, UnknownDemand) as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    table = Table("bound", "on time", "of requests")
    for name, value in (
        ("alone on the cluster", found.alone),
        ("linear relaxation", found.linear),
        (f"integer, {'optimal' if found.integer_optimal else 'time ran out'}", found.integer),
        ("bound", found.bound),
    ):
        if value is not None:
            table.add_row(name, f"{value:.2%}", f"{value * found.requests:.2f}")
    console.print(table)
    console.print(f"{found.intervals} intervals, {found.variables} variables")
