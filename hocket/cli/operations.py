"""`hocket watch`, `hocket result` and `hocket ls`: requests that live by themselves."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from hocket.cli.common import Address, StateDir, client_of, console, run, settings
from hocket.cli.generate import cheaper, describe, greeting, target, write
from hocket.client import Generation, WatchEvent
from hocket.errors import NotFinished, RequestFailed
from hocket.v1.generation_pb2 import (
    Accepted,
    CancelledGeneration,
    Degraded,
    Finished,
    GenerationState,
    Progress,
)
from hocket.v1.types_pb2 import Failure

Name = Annotated[str, typer.Argument(help="Request id, as `hocket generate` printed it.")]
_PREFIX = "GENERATION_STATE_"


def watch(
    request: Name,
    cursor: Annotated[str, typer.Option(help="Start after this cursor.")] = "",
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Prints the events of a request until it ends, whoever submitted it."""
    found = settings(state_dir, address)

    async def work() -> None:
        client = client_of(found)
        async with client, aclosing(client.watch(request, cursor)) as told:
            async for event, _ in told:
                console.print(_line(event, request))

    run(work())


def result(
    request: Name,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the request ends.")] = False,
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Writes the file of a finished request."""
    found = settings(state_dir, address)

    async def work() -> Path:
        async with client_of(found) as client:
            made = await (client.wait(request) if wait else client.get(request))
            if made.error is not None:
                raise made.error
            if made.finished is None:
                raise NotFinished(request, _state(made))
            path = target(output, request, made.finished.media)
            write(path, await client.result(request))
            return path

    console.print(str(run(work())))


def ls(
    count: Annotated[int, typer.Option("-n", min=1, help="Most requests to list.")] = 20,
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Lists requests, the newest first."""
    found = settings(state_dir, address)

    async def work() -> list[Generation]:
        rows: list[Generation] = []
        client = client_of(found)
        async with client, aclosing(client.list()) as listed:
            async for made in listed:
                rows.append(made)
                if len(rows) == count:
                    break
        return rows

    table = Table(Column("request", overflow="fold"), "state", "model", "size", "steps", "prompt")
    for made in run(work()):
        spec = made.metadata.accepted.effective_spec
        size = f"{spec.shape.width}x{spec.shape.height}"
        now = made.metadata.progress
        steps = f"{now.node} {now.step}/{now.steps}" if now.steps and not made.done else ""
        table.add_row(
            made.request_id,
            _state(made).lower(),
            spec.model,
            size,
            steps or str(spec.steps),
            spec.prompt,
        )
    console.print(table)


def _line(event: WatchEvent, request: str) -> str:
    match event:
        case Accepted():
            return greeting(event)
        case Progress():
            return describe(event)
        case Degraded():
            return cheaper(event)
        case Finished():
            kept = "on time" if event.on_time else "late"
            return f"took {event.latency_us / 1e6:.2f} s, {kept}   (hocket result {request})"
        case Failure():
            raise RequestFailed(event.reason, event.message)
        case CancelledGeneration():
            return f"cancelled after {event.steps_done} steps"


def _state(made: Generation) -> str:
    return GenerationState.Name(made.metadata.state).removeprefix(_PREFIX)
