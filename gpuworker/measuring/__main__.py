"""`python -m gpuworker.measuring SECTION --out FILE`: figures of one device, as JSON lines.

Sections: `steps MODEL`, `groups`, `layouts`. `python -m bench gpu` runs them, each in a
process of its own, and writes the report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from gpuworker.measuring.joining import measure_groups, measure_layouts
from gpuworker.measuring.record import MeasurementLog
from gpuworker.measuring.sizes import SIZES, TINY, best_device
from gpuworker.measuring.steps import measure_steps

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="JSON lines; what is there is not measured again.")]
Tiny = Annotated[bool, typer.Option(help="Tiny models, few pairs: shows that it runs.")]
Minutes = Annotated[float, typer.Option(help="No new cell begins after so long.")]


@app.command()
def steps(
    model: str,
    out: Out,
    tiny: Tiny = False,
    minutes: Minutes = 60.0,
    pairs: Annotated[int, typer.Option(help="Pairs of steps a cell, at most.")] = 16,
    cell_s: Annotated[float, typer.Option(help="Seconds a cell, about.")] = 20.0,
) -> None:
    """Step times of one size against plain diffusers."""
    where = best_device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    size = (TINY if tiny else SIZES)[model]
    # Without a GPU what matters is that Dynamo sees through the blocks; C++ would take a minute.
    backend = "inductor" if where.type == "cuda" else "eager"
    record = MeasurementLog(out, minutes)
    measure_steps(size, where, dtype, record, 3 if tiny else pairs, cell_s, backend)


@app.command()
def groups(out: Out, tiny: Tiny = False, minutes: Minutes = 10.0) -> None:
    """Communicators: cold, warm, given up; of one member, and of as many as there are GPUs."""
    measure_groups(MeasurementLog(out, minutes), best_device().type, 3 if tiny else 20)


@app.command()
def layouts(out: Out, tiny: Tiny = False, minutes: Minutes = 20.0) -> None:
    """One step in every layout of 2, 4 and 8 members, a GPU each, against one member."""
    size = next(iter((TINY if tiny else SIZES).values()))
    measure_layouts(MeasurementLog(out, minutes), size.name, best_device().type, 2 if tiny else 8)


if __name__ == "__main__":
    app()
