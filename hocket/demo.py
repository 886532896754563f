"""`hocket demo`: five prompts at three sizes at once, workers drained under one of them, checked.

It shows what the mesh is for: each request's degree of parallelism changes between steps, and a
job moves to other workers when its own is taken away. When the plan happened to need neither, the
requests are made again, a few times, and then the demo fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from rich.console import Group
from rich.live import Live
from rich.text import Text

from hocket.channels import CHANNEL_OPTIONS
from hocket.cli_common import console
from hocket.cli_generate import describe, target
from hocket.client import HocketClient, request
from hocket.errors import HocketError, MeshStopped, from_rpc_error
from hocket.launcher import RunningMesh
from hocket.v1.control_pb2 import DrainWorkerRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import Accepted, Finished, MediaChunk, ModelInfo, Progress

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only

PROMPTS = ("a red apple", "a fox", "a lighthouse")
# The first one starts alone and is split over two workers; then the others come, and there are more
# requests than workers; at the end there are fewer again.
SIDES = (256, 64, 128, 256, 256)
DEADLINES_S = {64: 4.0, 128: 8.0, 256: 20.0}
_ALONE_STEPS = 3
_ROUNDS_MAX = 4
_DENOISER = "dit"
_DRAIN_S = 10.0
_CALL_S = 120.0  # listening to one request
_DRAIN_FROM, _DRAIN_TO = 0.4, 0.8  # part of a job's steps within which its worker is drained


@dataclass
class Run:
    """One request and what was seen of it."""

    prompt: str
    side: int
    deadline_s: float
    accepted: Accepted = field(default_factory=Accepted)
    finished: Finished | None = None
    steps: list[Progress] = field(default_factory=list)
    line: str = "waiting"
    path: Path | None = None


async def show(running: RunningMesh, output: Path) -> None:
    """Makes the pictures and prints how; raises MeshStopped when nothing was resized or moved."""
    seen: list[Run] = []
    async with HocketClient(running.gateway) as client:
        known = await client.models(wait_for_ready=True)
        for number in range(_ROUNDS_MAX):
            runs = _runs(known[0], number)
            await _make(runs, client, running.control, output)
            seen += runs
            for one in runs:
                console.print(summary(one), markup=False, soft_wrap=True)
            done = [one.finished for one in seen if one.finished is not None]
            resized = sum(finished.degree_changes > 0 for finished in done)
            moved = sum(finished.moves > 0 for finished in done)
            if resized and moved:
                console.print(f"{resized} of {len(seen)} requests changed degree, {moved} moved")
                return
            console.print("no degree change or no move in these; once more")
    raise MeshStopped(f"after {_ROUNDS_MAX} rounds: {resized} resized, {moved} moved")


def step_runs(steps: Sequence[Progress]) -> str:
    """The steps of a job in runs: "steps 1-6 x1 [w0], 7-20 x2 [w0 w1]"."""
    pieces: list[str] = []
    for (degree, workers), group in groupby(steps, key=lambda p: (p.degree, tuple(p.workers))):
        numbers = [progress.step for progress in group]
        first, last = numbers[0], numbers[-1]
        span = f"{first}" if first == last else f"{first}-{last}"
        pieces.append(f"{span} x{degree} [{' '.join(workers)}]")
    return f"steps {', '.join(pieces)}" if pieces else "no steps seen"


def summary(run: Run) -> str:
    """What a person wants to know about one request."""
    head = f"{run.side}x{run.side} {run.prompt!r}"
    if run.finished is None:
        return f"{head}: {run.line}"
    done = run.finished
    kept = "kept" if done.on_time else "MISSED"
    return (
        f"{head}  request {run.accepted.request_id}\n"
        f"  {step_runs(run.steps)}\n"
        f"  predicted {done.predicted_latency_us / 1e6:.2f} s, took {done.latency_us / 1e6:.2f} s, "
        f"deadline {run.deadline_s:g} s {kept}; degree changes {done.degree_changes}, "
        f"moves {done.moves}\n"
        f"  {run.path}"
    )


def _runs(model: ModelInfo, number: int) -> list[Run]:
    served = sorted({shape.width for shape in model.shapes})
    sides = [side if side in served else served[-1] for side in SIDES]
    prompts = list(model.examples) or list(PROMPTS)
    shift = number * len(sides)
    return [
        Run(prompts[(shift + k) % len(prompts)], side, DEADLINES_S.get(side, 60.0))
        for k, side in enumerate(sides)
    ]


async def _make(runs: list[Run], client: HocketClient, control: str, output: Path) -> None:
    """Runs the first request, soon all of them; drains the first one's workers under way."""
    drain = _Drain(control)
    crowded = asyncio.Event()
    try:
        with Live(console=console, transient=True, refresh_per_second=8) as live:
            async with asyncio.TaskGroup() as tasks:
                for one in runs:
                    tasks.create_task(_follow(one, runs, client, drain, crowded, live, output))
    except* HocketError as errors:
        raise errors.exceptions[0] from None
    finally:
        await drain.undo()


async def _follow(
    run: Run,
    runs: list[Run],
    client: HocketClient,
    drain: _Drain,
    crowded: asyncio.Event,
    live: Live,
    output: Path,
) -> None:
    whole = bytearray()
    first = run is runs[0]
    if not first:
        await crowded.wait()
    wanted = request(run.prompt, shape=(run.side, run.side), deadline_s=run.deadline_s)
    async with aclosing(client.generate(wanted, timeout_s=_CALL_S)) as events:
        async for event in events:
            match event:
                case Accepted():
                    run.accepted = event
                    run.line = f"accepted, predicted {event.predicted_latency_us / 1e6:.2f} s"
                case Progress():
                    run.line = describe(event)
                    if event.node == _DENOISER:
                        run.steps.append(event)
                        if first:
                            await drain.consider(event)
                        if event.step >= _ALONE_STEPS:
                            crowded.set()
                case MediaChunk():
                    whole += event.data
                case Finished():
                    crowded.set()
                    run.finished, run.line = event, "done"
                    run.path = target(None, run.accepted.request_id, event.media)
                    run.path = output / run.path.name
            live.update(Group(*(Text(f"{r.side:4} {r.prompt}: {r.line}") for r in runs)))
    if run.path is not None:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        run.path.write_bytes(bytes(whole))


class _Drain:
    """Takes the workers of one running job away, once, and gives them back in the end."""

    def __init__(self, control: str) -> None:
        self._control = control
        self._workers: tuple[str, ...] = ()

    async def consider(self, progress: Progress) -> None:
        """Drains the step's workers if its job is well under way and there are others."""
        part = progress.step / progress.steps
        if self._workers or progress.degree > 2 or not _DRAIN_FROM <= part <= _DRAIN_TO:
            return
        self._workers = tuple(progress.workers)
        console.print(f"draining {' '.join(self._workers)}: the job there moves")
        await self._set(undo=False)

    async def undo(self) -> None:
        if self._workers:
            await self._set(undo=True)

    async def _set(self, *, undo: bool) -> None:
        async with grpc.aio.insecure_channel(self._control, options=CHANNEL_OPTIONS) as channel:
            stub: ControlServiceAsyncStub = ControlServiceStub(channel)
            try:
                for worker in self._workers:
                    wanted = DrainWorkerRequest(worker=worker, undo=undo)
                    await stub.DrainWorker(wanted, timeout=_DRAIN_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
