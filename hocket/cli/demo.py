"""`hocket demo`: a video while pictures come and go, workers drained under it, and who was
interrupted for whom.

    video     ███████▓▓▓░░░░░░▓▓▓███████      the deadline is far: it gives way
    pictures        ████████                  the deadlines are near: they overtake it

It shows what the mesh is for: a request is paused, resized and moved between any two of its steps,
and all of them keep their deadlines. When the plan happened to need none of it, the requests are
made again, a few times, and then the demo fails. Where no model makes videos, the largest picture
takes the video's part.
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
import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

from hocket.cli import demo_passes
from hocket.cli.common import console
from hocket.cli.generate import describe, shape_name, target
from hocket.client import HocketClient, request
from hocket.errors import HocketError, MeshStopped, from_rpc_error
from hocket.launching.launcher import RunningMesh
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.tracing import gantt
from hocket.tracing.interruptions import (
    Interruption,
    InterruptionKind,
    Stretch,
    interruptions,
    stretches,
)
from hocket.tracing.span_file import SpanRecord, read_spans
from hocket.tracing.trace_view import chrome_trace
from hocket.v1.control_pb2 import DrainWorkerRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import Accepted, Finished, MediaChunk, ModelInfo, Progress
from hocket.v1.types_pb2 import Shape

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only

PROMPTS = ("a red apple", "a fox", "a lighthouse")
# The video starts alone and is split over two workers. Pictures come in waves, more of them than
# there are workers; between and after the waves the video has room again.
WAVES = ((128, 64, 256, 128, 64), (128, 64, 128, 64))
WAVES_AT = (0.15, 0.6)  # parts of the video's steps
DEADLINES_S = {64: 5.0, 128: 8.0, 256: 20.0}
VIDEO_DEADLINE_S = 90.0
_ROUNDS_MAX = 4
_DENOISER = "dit"
_DECODER = "vae"
_DRAIN_S = 10.0
_CALL_S = 240.0  # listening to one request
_DRAIN_FROM, _DRAIN_TO = 0.3, 0.55  # part of a job's steps within which its workers are drained
_SPANS_S = 5.0  # workers write their spans within milliseconds
_POLL_S = 0.05
_CHART_COLUMNS = 100


@dataclass
class DemoRequest:
    """One request and what was seen of it."""

    prompt: str
    shape: Shape
    deadline_s: float
    model: str = ""
    wave: int | None = None  # None: the first request, which the others come on top of
    accepted: Accepted = field(default_factory=Accepted)
    finished: Finished | None = None
    steps: list[Progress] = field(default_factory=list)
    line: str = "waiting"
    path: Path | None = None

    @property
    def title(self) -> str:
        """What it is called in lists: "128x128 a fox"."""
        return f"{shape_name(self.shape)} {self.prompt!r}"


@dataclass
class Seen:
    """What the steps of a round of requests show."""

    stretches: list[Stretch]
    happened: list[Interruption]

    def overtaken(self, request: str) -> int:
        """How often others took workers of a request."""
        return sum(i.request == request and bool(i.overtakers) for i in self.happened)


async def show(running: RunningMesh, output: Path, state_dir: Path) -> None:
    """Makes a video and pictures, then one in two passes, and prints how.

    Raises MeshStopped when nothing gave way.
    """
    async with HocketClient(running.gateway) as client:
        known = await client.models(wait_for_ready=True)
        await _preempted(client, known, running.control, output, state_dir)
        if (model := demo_passes.able(known)) is not None:
            await demo_passes.show(client, model, output)


async def _preempted(
    client: HocketClient, known: Sequence[ModelInfo], control: str, output: Path, state_dir: Path
) -> None:
    """Rounds of requests, until some gave way, changed degree and moved."""
    told: list[str] = []
    for number in range(_ROUNDS_MAX):
        runs = _runs(known, number)
        await _make(runs, client, control, output)
        for one in runs:
            console.print(summary(one), markup=False, soft_wrap=True)
        spans = await _spans(runs, state_dir)
        seen = _seen(spans, runs)
        _tell(seen, runs)
        _write(seen, spans, runs, output)
        overtaken = seen.overtaken(runs[0].accepted.request_id)
        done = [one.finished for one in runs if one.finished is not None]
        resized = sum(finished.degree_changes > 0 for finished in done)
        moved = sum(finished.moves > 0 for finished in done)
        kept = sum(finished.on_time for finished in done)
        told.append(f"{overtaken} preempted, {resized} resized, {moved} moved")
        if overtaken and resized and moved:
            console.print(
                f"the first was preempted {overtaken} times, {resized} of {len(runs)} requests "
                f"changed degree, {moved} moved, {kept} of {len(runs)} kept their deadlines"
            )
            return
        console.print("not all of preemption, resizing and moving happened; trying again")
    raise MeshStopped(f"after {_ROUNDS_MAX} rounds: {'; '.join(told)}")


def step_runs(steps: Sequence[Progress]) -> str:
    """The steps of a job in runs: "steps 1-6 x1 [w0], 7-20 x2 [w0 w1]"."""
    pieces: list[str] = []
    for (degree, workers), group in groupby(steps, key=lambda p: (p.degree, tuple(p.workers))):
        numbers = [progress.step for progress in group]
        first, last = numbers[0], numbers[-1]
        span = f"{first}" if first == last else f"{first}-{last}"
        pieces.append(f"{span} x{degree} [{' '.join(workers)}]")
    return f"steps {', '.join(pieces)}" if pieces else "no steps seen"


def summary(run: DemoRequest) -> str:
    """What a person wants to know about one request."""
    if run.finished is None:
        return f"{run.title}: {run.line}"
    done = run.finished
    kept = "kept" if done.on_time else "MISSED"
    return (
        f"{run.title}  request {run.accepted.request_id}\n"
        f"  {step_runs(run.steps)}\n"
        f"  predicted {done.predicted_latency_us / 1e6:.2f} s, took {done.latency_us / 1e6:.2f} s, "
        f"deadline {run.deadline_s:g} s {kept}; degree changes {done.degree_changes}, "
        f"moves {done.moves}\n"
        f"  {run.path}"
    )


def _runs(known: Sequence[ModelInfo], number: int) -> list[DemoRequest]:
    """The video, or the largest picture, and the pictures that overtake it."""
    pictures = next((m for m in known if "txt2vid" not in m.workflows), known[0])
    first = next((m for m in known if "txt2vid" in m.workflows), pictures)
    largest = max(first.shapes, key=lambda s: s.width * s.height * max(1, s.frames))
    deadline_s = VIDEO_DEADLINE_S if first is not pictures else DEADLINES_S.get(largest.width, 60.0)
    runs = [DemoRequest(_prompt(first, number), largest, deadline_s, first.name)]
    served = {shape.width: shape for shape in sorted(pictures.shapes, key=lambda s: s.width)}
    for wave, sides in enumerate(WAVES):
        for side in sides:
            shape = served.get(side, list(served.values())[-1])
            prompt = _prompt(pictures, number + len(runs))
            due_s = DEADLINES_S.get(shape.width, 60.0)
            runs.append(DemoRequest(prompt, shape, due_s, pictures.name, wave))
    return runs


def _prompt(model: ModelInfo, number: int) -> str:
    prompts = list(model.examples) or list(PROMPTS)
    return prompts[number % len(prompts)]


async def _make(runs: list[DemoRequest], client: HocketClient, control: str, output: Path) -> None:
    """Runs the first request, and the waves on top of it; drains its workers under way."""
    drain = _Drain(control)
    waves = [asyncio.Event() for _ in WAVES]
    try:
        with Live(console=console, transient=True, refresh_per_second=8) as live:
            async with asyncio.TaskGroup() as tasks:
                for one in runs:
                    tasks.create_task(_follow(one, runs, client, drain, waves, live, output))
    except* HocketError as errors:
        raise errors.exceptions[0] from None
    finally:
        await drain.undo()


async def _follow(
    run: DemoRequest,
    runs: list[DemoRequest],
    client: HocketClient,
    drain: _Drain,
    waves: list[asyncio.Event],
    live: Live,
    output: Path,
) -> None:
    whole = bytearray()
    if run.wave is not None:
        await waves[run.wave].wait()
    size = (run.shape.width, run.shape.height)
    wanted = request(run.prompt, model=run.model, shape=size, deadline_s=run.deadline_s)
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
                        if run.wave is None:
                            await drain.consider(event)
                            _let_go(waves, event.step / event.steps)
                case MediaChunk():
                    whole += event.data
                case Finished():
                    if run.wave is None:
                        _let_go(waves, 1.0)
                    run.finished, run.line = event, "done"
                    run.path = output / target(None, run.accepted.request_id, event.media).name
            live.update(Group(*(Text(f"{r.title}: {r.line}") for r in runs)))
    if run.path is not None:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        run.path.write_bytes(bytes(whole))


def _let_go(waves: list[asyncio.Event], part: float) -> None:
    for wave, at in zip(waves, WAVES_AT, strict=True):
        if part >= at:
            wave.set()


async def _spans(runs: Sequence[DemoRequest], state_dir: Path) -> list[SpanRecord]:
    """All spans, once the decodes of these requests are among them."""
    wanted = {one.accepted.request_id for one in runs if one.finished is not None}
    async with asyncio.timeout(_SPANS_S):
        while True:
            spans = read_spans(state_dir / "traces")
            if wanted <= {s.request for s in stretches(spans) if s.node == _DECODER}:
                return spans
            await asyncio.sleep(_POLL_S)


def _seen(spans: Sequence[SpanRecord], runs: Sequence[DemoRequest]) -> Seen:
    names = {one.accepted.request_id for one in runs}
    found = [s for s in stretches(spans) if s.request in names]
    return Seen(found, interruptions(found))


def _tell(seen: Seen, runs: Sequence[DemoRequest]) -> None:
    """Prints who was where, and who was interrupted when and for whom."""
    names = {one.accepted.request_id: one.title for one in runs}
    console.print("\nwho ran where:")
    columns = max(20, min(_CHART_COLUMNS, console.width - 8))
    for line in gantt.chart(seen.stretches, columns):
        console.print(line, soft_wrap=True)
    for name, letter in gantt.letters(gantt.order(seen.stretches)).items():
        console.print(f"  {letter} {names[name]}", markup=False, highlight=False)
    console.print("\npreemptions and moves:")
    start_ns = min(s.start_ns for s in seen.stretches)
    for one in seen.happened:
        if one.kind is InterruptionKind.PAUSED or one.overtakers:
            sentence = gantt.told(one, names, start_ns)
            console.print(f"  {sentence}", markup=False, highlight=False, soft_wrap=True)


def _write(
    seen: Seen, spans: Sequence[SpanRecord], runs: Sequence[DemoRequest], output: Path
) -> None:
    names = {one.accepted.request_id: one.title for one in runs}
    output.mkdir(parents=True, exist_ok=True)
    page, trace = output / "timeline.html", output / "timeline.json"
    page.write_text(gantt.page("hocket demo", seen.stretches, seen.happened, names))
    trace.write_bytes(msgspec.json.encode(chrome_trace(spans)))
    console.print(f"\ntimeline: {page} (any browser), {trace} (ui.perfetto.dev)", soft_wrap=True)


class _Drain:
    """Takes the workers of one running job away, once, and gives them back when it has moved."""

    def __init__(self, control: str) -> None:
        self._control = control
        self._workers: tuple[str, ...] = ()
        self._undone = False

    async def consider(self, progress: Progress) -> None:
        """Drains the step's workers if its job is well under way and there are others."""
        part = progress.step / progress.steps
        if self._workers:
            if not self._undone and set(progress.workers).isdisjoint(self._workers):
                await self.undo()
            return
        if progress.degree > 2 or not _DRAIN_FROM <= part <= _DRAIN_TO:
            return
        self._workers = tuple(progress.workers)
        console.print(f"draining {' '.join(self._workers)}: the job there moves")
        await self._set(undo=False)

    async def undo(self) -> None:
        if self._workers and not self._undone:
            self._undone = True
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
