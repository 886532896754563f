"""`hocket up` and `hocket demo`: a whole mesh on this machine."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from hocket.cli import demo as showing
from hocket.cli.common import StateDir, complaints, console, run, settings
from hocket.errors import MeshStopped
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.launching.restarts import DEFAULT, RestartRule

Workers = Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")]
# The names of control's registry: the command imports no service.
POLICIES = (
    *("hocket", "tetriserve", "genserve", "diflow", "disagfusion", "edf", "edf-greedy"),
    *("srtf", "sjf", "rssp", "rasp", "fixed-1", "fixed-2", "fixed-4", "fixed-8"),
    *("diffusers", "diffusers-c", "diffusers-s", "monolith"),
)
_POLICY = f"Planning policy: {', '.join(POLICIES)}. Default: control's."
Policy = Annotated[str, typer.Option(help=_POLICY)]
NatsUrl = Annotated[str, typer.Option(help="URL of a running broker; default: starts one.")]
Model = Annotated[
    list[str] | None, typer.Option(help="Folder or hub id, also NAME=FOLDER; repeatable.")
]
Roles = Annotated[
    list[str] | None,
    typer.Option(help="What one worker loads, as text,vae; as often as there are workers."),
]
Executor = Annotated[str, typer.Option(help="torch; or emulated: sleeps, computes nothing.")]
Profile = Annotated[str, typer.Option(help="CSV of call times for emulated workers.")]
BatchMax = Annotated[
    int, typer.Option(min=0, max=32, help="Most jobs in a batch; 0: the worker's default.")
]
Listen = Annotated[str, typer.Option(help="host:port of the gateway; port 0 picks a free one.")]
Controls = Annotated[
    int, typer.Option(min=1, max=9, help="Control replicas: one leads, the others stand by.")
]
Gateways = Annotated[int, typer.Option(min=1, max=9, help="Gateways, all equal.")]
Brokers = Annotated[int, typer.Option(help="nats-servers: 1, or 3 or 5 as a cluster.")]
RestartsMax = Annotated[
    int, typer.Option(min=0, help="Restarts of one process in 10 minutes; one more ends the mesh.")
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]


def up(
    workers: Workers = 4,
    policy: Policy = "",
    state_dir: StateDir = None,
    nats_url: NatsUrl = "",
    model: Model = None,
    roles: Roles = None,
    executor: Executor = "",
    profile: Profile = "",
    batch_max: BatchMax = 0,
    listen: Listen = "127.0.0.1:0",
    controls: Controls = 1,
    gateways: Gateways = 1,
    brokers: Brokers = 1,
    restarts_max: RestartsMax = DEFAULT.most,
    log_level: LogLevel = "info",
) -> None:
    """Starts nats-server, control, workers and a gateway, and runs them until Ctrl-C.

    A process that dies is started again.
    """
    if brokers not in (1, 3, 5):
        raise typer.BadParameter(f"--brokers is 1, 3 or 5, not {brokers}")
    if roles and len(roles) != workers:
        told = f"--roles is given once for each of the {workers} workers, not {len(roles)} times"
        raise typer.BadParameter(told)
    found = settings(state_dir)
    plan = MeshPlan(
        state_dir=found.state_dir,
        workers=workers,
        cluster=found.cluster,
        policy=policy,
        nats_url=nats_url,
        listen=listen,
        models=tuple(model or ()),
        roles=tuple(tuple(each.split(",")) for each in roles or ()),
        pools=workers if roles else 1,
        executor=executor,
        profile=profile,
        batch_max=batch_max,
        log_level=log_level,
        controls=controls,
        gateways=gateways,
        brokers=brokers,
        restarts=RestartRule(most=restarts_max),
    )

    async def work() -> None:
        async with mesh(plan, report) as running:
            _greet(plan, running)
            await _until_given_up(running)

    run(until_stopped(work(), lambda: report("stopping …")))


def demo(
    workers: Workers = 4,
    policy: Policy = "",
    state_dir: StateDir = None,
    nats_url: NatsUrl = "",
    model: Model = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results.")] = Path(
        "out"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the mesh running.")] = False,
) -> None:
    """Starts a mesh, makes a video that pictures preempt, prints who ran where, stops."""

    async def work(folder: Path) -> None:
        plan = MeshPlan(
            state_dir=folder,
            workers=workers,
            policy=policy,
            nats_url=nats_url,
            models=tuple(model or ()),
        )
        async with mesh(plan, report) as running:
            await showing.show(running, output, folder)
            if keep:
                _greet(plan, running)
                await _until_given_up(running)

    def start(folder: Path) -> None:
        run(until_stopped(work(folder), lambda: report("stopping …")))

    if state_dir is not None or keep:
        start(settings(state_dir).state_dir)
        return
    with tempfile.TemporaryDirectory(prefix="hocket-", ignore_cleanup_errors=True) as folder:
        start(Path(folder))


async def _until_given_up(running: RunningMesh) -> None:
    dead = await running.children.given_up()
    times = f"{dead.restarts.count} restarts"
    raise MeshStopped(f"{dead.name} {dead.ended}, after {times}\n{dead.log_tail()}")


async def until_stopped(work: Coroutine[Any, Any, None], on_stop: Callable[[], None]) -> None:
    """Runs `work` until it ends or SIGINT or SIGTERM comes; its clean-up is never interrupted."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:  # a second Ctrl-C must not break the clean-up off
            stopping = True
            on_stop()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise


def report(line: str) -> None:
    """One line of the launcher's own."""
    complaints.print(line, markup=False, soft_wrap=True)


def _greet(plan: MeshPlan, running: RunningMesh) -> None:
    option = "" if plan.state_dir == Path("state") else f" --state-dir {plan.state_dir}"
    console.print(
        f"ready: gateway {', '.join(running.gateways)}, control {running.control}", soft_wrap=True
    )
    console.print(f'try:   hocket generate "a red apple"{option}', soft_wrap=True)
    console.print(f"look:  hocket status{option}   hocket trace{option}", soft_wrap=True)
