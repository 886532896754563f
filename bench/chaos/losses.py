"""`python -m bench losses`: a worker that holds about half of the artifacts of some requests is
killed, round after round. Which calls are made again?

Two torch workers, requests in two passes, all of a round at once; one worker is killed while one of
them is in its second pass. Files have to be byte-equal to those made undisturbed, and no call is
made again of which somebody who lives has the artifact.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from bench.chaos.calls_made import MadeCall, again, by_node, made_calls, needless
from bench.chaos.strikes import cluster_state
from bench.chaos.wishes import TWO_PASSES
from hocket.client import HocketClient, request
from hocket.clock import unix_ns
from hocket.errors import HocketError
from hocket.launching import endpoints
from hocket.launching.launcher import MeshPlan, mesh
from hocket.launching.machine import machine_kind
from hocket.launching.restarts import RestartRule
from hocket.tracing.span_file import read_spans
from hocket.v1.generation_pb2 import Accepted, GenerateRequest, MediaChunk, Progress

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
_WORKERS = 2
_LAST_NODE, _SECOND = "media", "denoise"
_WAIT_S = 300.0


class LossRound(msgspec.Struct, frozen=True):
    """One worker killed."""

    victim: str
    requests: int
    made: int  # calls, a step of a node being one
    before: int  # of them before the kill, of requests that had not ended
    held: float  # share of those in which the victim took part alone
    again: dict[str, int]  # calls made again, by node
    needless: int  # of them, of which somebody else had the artifact
    equal: int  # files byte-equal to the undisturbed ones


@dataclass
class _Seen:
    """What one call brought."""

    request: str = ""
    media: bytearray = field(default_factory=bytearray)


def losses_command(
    rounds: Annotated[int, typer.Option(help="Workers killed.", min=1)] = 8,
    requests: Annotated[int, typer.Option(help="Requests of a round.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of a request.", min=4)] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/chaos/losses.json"
    ),
) -> None:
    """Kills workers in the second pass of requests: only what was lost is made again."""
    try:
        found = asyncio.run(_run(rounds, requests, steps, seed, console.print))
    except HocketError as error:
        console.print(f"[red]{error}", markup=True)
        raise typer.Exit(2) from error
    made, repeated = sum(one.made for one in found), sum(sum(o.again.values()) for o in found)
    nodes = sorted({node for one in found for node in one.again})
    report = {
        "command": f"python -m bench losses --rounds {rounds} --requests {requests} "
        f"--steps {steps} --seed {seed}",
        "machine": machine_kind(),
        "requests": sum(one.requests for one in found),
        "calls": made - repeated,
        "again": repeated,
        "again_by_node": {node: sum(o.again.get(node, 0) for o in found) for node in nodes},
        "needless": sum(one.needless for one in found),
        "held_share": round(sum(one.held for one in found) / len(found), 3),
        "files_equal": sum(one.equal for one in found),
        "rounds": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    console.print({name: value for name, value in report.items() if name != "rounds"})
    if report["needless"] or report["files_equal"] != report["requests"]:
        raise typer.Exit(1)


def _asked(steps: int, seed: int) -> GenerateRequest:
    return request("a red fox", workflow=TWO_PASSES, shape=(128, 128), steps=steps, seed=seed)


async def _run(
    rounds: int, requests: int, steps: int, seed: int, told: Callable[[str], None]
) -> list[LossRound]:
    with tempfile.TemporaryDirectory(prefix="hocket-losses-", ignore_cleanup_errors=True) as name:
        plan = MeshPlan(
            Path(name),
            workers=_WORKERS,
            policy="fixed-1",
            batch_max=1,
            log_level="warning",
            restarts=RestartRule(most=10_000, calm_s=20.0),
        )
        seeds = range(seed, seed + requests)
        async with mesh(plan, told) as running, HocketClient(running.gateway) as client:
            files = [(await client.generate_media(_asked(steps, one)))[0] for one in seeds]
            return [
                await _round(client, plan.state_dir, [_asked(steps, one) for one in seeds], files)
                for _ in range(rounds)
            ]


async def _round(
    client: HocketClient,
    state_dir: Path,
    asked: Sequence[GenerateRequest],
    files: Sequence[bytes],
) -> LossRound:
    seen, inside = [_Seen() for _ in asked], asyncio.Event()
    workers: list[str] = []

    async def follow(one: _Seen, wanted: GenerateRequest) -> None:
        async for event in client.generate(wanted):
            if isinstance(event, Accepted):
                one.request = event.request_id
            elif isinstance(event, Progress) and event.node == _SECOND and event.step > 2:
                workers[:] = workers or event.workers
                inside.set()
            elif isinstance(event, MediaChunk):
                one.media += event.data

    await _until(lambda: _all_alive(state_dir))
    async with asyncio.timeout(_WAIT_S), asyncio.TaskGroup() as tasks:
        for one, wanted in zip(seen, asked, strict=True):
            tasks.create_task(follow(one, wanted))
        await inside.wait()
        victim = endpoints.find(state_dir, workers[0])
        assert victim is not None, workers
        os.kill(victim.pid, signal.SIGKILL)
        struck_ns = unix_ns()
    names = [one.request for one in seen]

    async def all_written() -> bool:
        return by_node(_calls(state_dir, names)).get(_LAST_NODE, 0) >= len(asked)

    await _until(all_written)
    made = _calls(state_dir, names)
    over = {c.request for c in made if c.node == _LAST_NODE and c.start_ns < struck_ns}
    before = [c for c in made if c.start_ns < struck_ns and c.request not in over]
    return LossRound(
        victim=workers[0],
        requests=len(asked),
        made=len(made),
        before=len(before),
        held=round(sum(c.workers == (workers[0],) for c in before) / max(1, len(before)), 3),
        again=by_node(again(made)),
        needless=len(needless(made, workers[0])),
        equal=sum(bytes(one.media) == file for one, file in zip(seen, files, strict=True)),
    )


def _calls(state_dir: Path, requests: Sequence[str]) -> list[MadeCall]:
    return made_calls(read_spans(state_dir / "traces"), requests)


async def _all_alive(state_dir: Path) -> bool:
    leader = endpoints.find(state_dir, "control")
    state = await cluster_state(leader.address) if leader is not None else None
    living = {worker.name for worker in state.workers} if state is not None else set()
    pids = [endpoints.find(state_dir, worker) for worker in living]
    return len(living) == _WORKERS and None not in pids


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_WAIT_S):
        while not await condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.2)
