"""`hocket status`, `drain`, `cancel`, `trace` and `timeline`: looking at a mesh and steering it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hocket.cli.common import (
    Address,
    Control,
    StateDir,
    client_of,
    console,
    control_of,
    run,
    settings,
)
from hocket.cli.status_view import status_view
from hocket.errors import MeshStopped, UnknownRequest
from hocket.launching import mesh_file
from hocket.tracing import gantt
from hocket.tracing.interruptions import interruptions, stretches
from hocket.tracing.span_file import SpanRecord, read_spans
from hocket.tracing.trace_view import chrome_trace, latest_request, spans_of, timeline
from hocket.v1.control_pb2 import DrainWorkerRequest, WatchClusterRequest, WatchClusterResponse

_ANSWER_S = 10.0


def status(control: Control = None, state_dir: StateDir = None) -> None:
    """Shows workers, processes, control replicas, kept promises and open requests."""
    found = settings(state_dir, control=control)

    async def work() -> WatchClusterResponse:
        async with control_of(found) as stub:
            async for state in stub.WatchCluster(WatchClusterRequest(), timeout=_ANSWER_S):
                return state
        raise MeshStopped("control closed the stream without an answer")

    state = run(work())
    for part in status_view(state, mesh_file.read(found.state_dir)):
        console.print(part, soft_wrap=isinstance(part, str))


def drain(
    worker: Annotated[str, typer.Argument(help="Its name, as in `hocket status`.")],
    undo: Annotated[bool, typer.Option("--undo", help="Gives it work again.")] = False,
    control: Control = None,
    state_dir: StateDir = None,
) -> None:
    """Gives a worker no new steps; its jobs move at their next step boundaries."""
    found = settings(state_dir, control=control)

    async def work() -> int:
        async with control_of(found) as stub:
            answer = await stub.DrainWorker(
                DrainWorkerRequest(worker=worker, undo=undo), timeout=_ANSWER_S
            )
            return answer.jobs_held

    held = run(work())
    done = "works again" if undo else f"is draining; it holds the latents of {held} jobs"
    console.print(f"{worker} {done}")


def cancel(
    request_id: Annotated[str, typer.Argument(help="As printed by `hocket generate`.")],
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Cancels a request at its next step boundary."""
    found = settings(state_dir, address)

    async def work() -> bool:
        async with client_of(found) as client:
            return await client.cancel(request_id)

    console.print(f"{request_id} {'is cancelled' if run(work()) else 'had already ended'}")


def trace(
    request_id: Annotated[str, typer.Argument(help="Request id; default: the last request.")] = "",
    state_dir: StateDir = None,
) -> None:
    """Prints what happened to a request, span by span."""
    folder = settings(state_dir).state_dir

    async def work() -> None:
        spans = _spans(folder)
        wanted = request_id or latest_request(spans)
        own = spans_of(wanted, spans)
        if not own:
            raise UnknownRequest(wanted)
        traces = ", ".join(sorted({span.trace_id for span in own}))
        console.print(f"request {wanted}, trace {traces}", soft_wrap=True)
        for line in timeline(own):
            console.print(line, markup=False, soft_wrap=True)

    run(work())


def timeline_file(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="File to write: .json for ui.perfetto.dev, or .html."),
    ] = Path("out/timeline.json"),
    state_dir: StateDir = None,
) -> None:
    """Writes what each worker ran, one track per worker, as a Chrome trace or a web page."""
    folder = settings(state_dir).state_dir

    async def work() -> None:
        spans = _spans(folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".html":
            found = stretches(spans)
            output.write_text(gantt.page("What the workers did", found, interruptions(found), {}))
            console.print(f"{output} (open it in a browser)")
            return
        output.write_bytes(msgspec.json.encode(chrome_trace(spans)))
        console.print(f"{output} (open it in Perfetto)")

    run(work())


def _spans(state_dir: Path) -> list[SpanRecord]:
    spans = read_spans(state_dir / "traces")
    if not spans:
        raise MeshStopped(f"no traces in {state_dir / 'traces'}: has a mesh run here?")
    return spans
