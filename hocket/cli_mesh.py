"""`hocket status`, `drain`, `cancel`, `trace` and `timeline`: looking at a mesh and steering it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from hocket import gantt
from hocket.cli_common import (
    Address,
    Control,
    StateDir,
    console,
    control_of,
    gateway_address,
    run,
    settings,
)
from hocket.client import HocketClient
from hocket.errors import MeshStopped, UnknownRequest
from hocket.interruptions import interruptions, stretches
from hocket.span_file import SpanRecord, read_spans
from hocket.trace_view import chrome_trace, latest_request, spans_of, timeline
from hocket.v1.control_pb2 import DrainWorkerRequest, WatchClusterRequest, WatchClusterResponse
from hocket.v1.types_pb2 import Memory

_ANSWER_S = 10.0


def status(control: Control = None, state_dir: StateDir = None) -> None:
    """Shows the workers and what is open."""
    found = settings(state_dir, control=control)

    async def work() -> WatchClusterResponse:
        async with control_of(found) as stub:
            async for state in stub.WatchCluster(WatchClusterRequest(), timeout=_ANSWER_S):
                return state
        raise MeshStopped("control closed the stream without a word")

    state = run(work())
    table = Table("worker", "device", "state", "heartbeat", "memory", "weights", "latents")
    for worker in state.workers:
        used, total = worker.memory_used_bytes / 2**20, worker.memory_total_bytes / 2**20
        slow = f", takes {worker.slowdown:.2f} times as long" if worker.slowdown > 1 else ""
        table.add_row(
            worker.name,
            worker.device,
            f"{worker.state}{slow}",
            f"{worker.heartbeat_age_us / 1e3:.0f} ms ago",
            f"{used:.0f} of {total:.0f} MiB",
            _weights(worker.memory),
            _latents(worker.memory),
        )
    console.print(table)
    served = ", ".join(model.name for model in state.models) or "none"
    console.print(
        f"policy {state.policy}, term {state.term}, {state.requests_open} requests open, "
        f"models: {served}"
    )


def _weights(memory: Memory) -> str:
    there = sum(part.resident for part in memory.parts)
    told = f"{_mib(memory.weights_bytes)} MiB, {there} of {len(memory.parts)} parts"
    if not memory.budget_bytes:
        return told
    return f"{told}, budget {_mib(memory.budget_bytes)} MiB, {memory.evictions} evictions"


def _latents(memory: Memory) -> str:
    spilled = memory.latents_host_bytes + memory.latents_file_bytes
    told = f"{_mib(memory.latents_bytes)} MiB"
    return f"{told}, {_mib(spilled)} MiB spilled" if spilled else told


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"


def drain(
    worker: Annotated[str, typer.Argument(help="Its name, as in `hocket status`.")],
    undo: Annotated[bool, typer.Option("--undo", help="Puts it back to work.")] = False,
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
        async with HocketClient(gateway_address(found)) as client:
            return await client.cancel(request_id)

    console.print(f"{request_id} {'is cancelled' if run(work()) else 'had ended before'}")


def trace(
    request_id: Annotated[str, typer.Argument(help="A request; none shows the last one.")] = "",
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
    """Writes what every worker did, one track a worker, as a Chrome trace or as a page."""
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
