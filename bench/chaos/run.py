"""One run: a mesh, references, load with faults, quiet, and what must hold then."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos import faults, leftovers
from bench.chaos.callers import ChaosCallers, Gateway, reference_files
from bench.chaos.checks import Leftovers, all_checks, nothing_left
from bench.chaos.history import History, Struck
from bench.chaos.ledger import written
from bench.chaos.strikes import Strikes, eventually
from bench.chaos.wishes import PATIENT, Errands, MediaWish, PlannedCall, catalogue
from hocket.client import HocketClient
from hocket.clock import steady_ns
from hocket.launching.launcher import MeshPlan, RunningMesh, mesh
from hocket.launching.restarts import RestartRule

_PROFILE = Path(__file__).parents[2] / "control/assets/profiles/hocket-emoji_cpu.csv"
_CONFIG_VARIABLE = "HOCKET_CONFIG"
_QUIET_S = 60.0
_CALL_LIMIT_S = 180.0
_THINK_S = 0.2
_TELL_S = 5.0
_CLUSTER = "local"
Told = Callable[[str], None]


@dataclass(frozen=True)
class ChaosPlan:
    """What is run."""

    seconds: float
    seed: int = 0
    workers: int = 4
    executor: str = "torch"
    controls: int = 2
    gateways: int = 2
    brokers: int = 1
    pools: int = 1  # parents of workers; SIGTERM goes to one of them, as to a host
    callers: int = 8
    targets: tuple[str, ...] = faults.TARGETS
    gap_s: tuple[float, float] = (4.0, 9.0)  # between the beginnings of two faults
    exact: bool = False  # one worker a job, one job a batch: files have to be byte-equal
    sizes: tuple[int, int] = (64, 128)
    steps: int = 12


@dataclass
class ChaosResult:
    """What was found."""

    history: History = field(default_factory=History)
    leftovers: Leftovers = field(default_factory=Leftovers)
    violations: list[str] = field(default_factory=list)
    requests_written: int = 0


async def run(plan: ChaosPlan, told: Told) -> ChaosResult:
    """Runs it all; about `plan.seconds` and a minute or two. Raises MeshStopped, HocketError."""
    with tempfile.TemporaryDirectory(prefix="hocket-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        found = ChaosResult()
        with _configured(plan, folder):
            async with _mesh(plan, folder, told) as (running, doors):
                workers = plan.workers if plan.executor == "torch" else 0
                strikes = Strikes(running, folder, workers)
                await _Run(plan, running, doors, strikes, found, told).go()
        await _nothing_runs_on(running, strikes, found)
    return found


class _Run:
    def __init__(
        self,
        plan: ChaosPlan,
        running: RunningMesh,
        doors: list[Gateway],
        strikes: Strikes,
        found: ChaosResult,
        told: Told,
    ) -> None:
        self._plan, self._mesh, self._doors = plan, running, doors
        self._strikes, self._found, self._told = strikes, found, told
        self._wishes = catalogue(plan.sizes, plan.steps)
        self._began_ns = steady_ns()
        self._over = False
        self._probes = 0

    def _now_s(self) -> float:
        return (steady_ns() - self._began_ns) / 1e9

    async def go(self) -> None:
        plan, found = self._plan, self._found
        self._told(f"references: {len(self._wishes)} files, undisturbed")
        references = await reference_files(self._doors[0], self._wishes, plan.seed)
        callers = ChaosCallers(
            self._doors, found.history, self._now_s, references, plan.exact, _CALL_LIMIT_S
        )
        await self._warm(callers)
        left = found.leftovers
        left.before = await self._figures()
        self._began_ns = steady_ns()
        await self._load(callers)
        await self._strikes.calm()
        self._told("the load is over: waiting until all is quiet")
        left.after = await leftovers.quiet(self._strikes.state_dir, _QUIET_S)
        left.before |= dict.fromkeys(left.after, 0.0)
        left.growth_max = leftovers.growth_max(left.before)
        left.after |= await self._settled_figures()
        records = await written(self._mesh.nats_url, _CLUSTER)
        found.requests_written = len(records)
        mine = [one for one in records if not one.key.startswith(("reference-", "warm-"))]
        found.violations = all_checks(found.history, mine, left)

    async def _warm(self, callers: ChaosCallers) -> None:
        """Each kind of thing at once, so that groups, connections and caches are there."""
        calls = [
            PlannedCall(
                number, f"warm-{self._plan.seed}-{number}", wish, PATIENT, number / 10 % 1, 0, 0
            )
            for number, wish in enumerate(self._wishes)
        ]
        shadow = ChaosCallers(
            callers.gateways, History(), self._now_s, {}, callers.exact, callers.limit_s
        )
        await asyncio.gather(*(shadow.run(call) for call in calls))

    async def _load(self, callers: ChaosCallers) -> None:
        errands = Errands(self._plan.seed, self._wishes)
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(self._tell())
            loads = [
                tasks.create_task(self._caller(callers, errands)) for _ in range(self._plan.callers)
            ]
            await self._strike(callers, tasks, loads)
            self._over = True
            await asyncio.gather(*loads)
            telling.cancel()

    async def _caller(self, callers: ChaosCallers, errands: Errands) -> None:
        while not self._over:
            await callers.run(errands.next())
            await asyncio.sleep(_THINK_S)

    async def _strike(
        self, callers: ChaosCallers, tasks: asyncio.TaskGroup, loads: list[asyncio.Task[None]]
    ) -> None:
        plan = self._plan
        for fault in faults.draw(plan.seed, plan.seconds, plan.targets, plan.gap_s):
            await asyncio.sleep(max(0.0, fault.at_s - self._now_s()))
            self._strikes.look()
            victim = await self._strikes.victim(fault)
            if victim is None:
                self._told(f"{self._now_s():5.0f} s  {fault.kind}: there is none now")
                continue
            history = self._found.history
            affected = history.affected(fault, victim.name)
            self._strikes.strike(fault, victim)
            probe = self._probe(fault)
            struck = Struck(fault, self._now_s(), victim.name, affected, probe.key)
            history.struck.append(struck)
            self._told(f"{self._now_s():5.0f} s  {fault.kind}: {victim.name}")
            loads.append(tasks.create_task(callers.run(probe)))
        await asyncio.sleep(max(0.0, plan.seconds - self._now_s()))

    def _probe(self, fault: faults.ChaosFault) -> PlannedCall:
        """A call that asks just when a fault has happened."""
        self._probes += 1
        key = f"chaos-{self._plan.seed}-probe-{self._probes}"
        return PlannedCall(self._probes, key, self._wishes[0], PATIENT, 1 - fault.pick, 0, 0)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            calls = self._found.history.calls.values()
            ended = sum(1 for observed in calls if observed.ended)
            self._told(
                f"{self._now_s():5.0f} s  {ended} calls ended, {len(calls) - ended} under way, "
                f"{sum(observed.breaks for observed in calls)} broken streams"
            )

    async def _figures(self) -> dict[str, float]:
        self._strikes.look()
        return await leftovers.look(self._strikes, list(self._mesh.monitors))

    async def _settled_figures(self) -> dict[str, float]:
        """The figures once they have come down, or as they are after a while."""
        left, figures = self._found.leftovers, await self._figures()
        for _ in range(30):
            if not nothing_left(Leftovers(left.before, figures, left.growth_max)):
                break
            await asyncio.sleep(1.0)
            figures = await self._figures()
        return figures


@asynccontextmanager
async def _mesh(
    plan: ChaosPlan, folder: Path, told: Told
) -> AsyncIterator[tuple[RunningMesh, list[Gateway]]]:
    wanted = MeshPlan(
        state_dir=folder,
        workers=plan.workers,
        cluster=_CLUSTER,
        policy="fixed-1" if plan.exact else "",
        executor=plan.executor,
        profile=str(folder / "profile.csv") if plan.executor == "emulated" else "",
        batch_max=1 if plan.exact else 0,
        log_level="warning",
        controls=plan.controls,
        gateways=plan.gateways,
        brokers=plan.brokers,
        monitors=True,
        pools=plan.pools,
        restarts=RestartRule(most=10_000, calm_s=20.0),
    )
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(mesh(wanted, told))
        doors = []
        for number, address in enumerate(running.gateways):
            others = (*running.gateways[number:], *running.gateways[:number])
            client = HocketClient(address, patience_s=0.0)
            rider = HocketClient(",".join(others))
            for connected in (client, rider):
                await stack.enter_async_context(connected)
            doors.append(Gateway(f"gateway-{number + 1}" if number else "gateway", client, rider))
        yield running, doors


@contextmanager
def _configured(plan: ChaosPlan, folder: Path) -> Iterator[None]:
    """Emulated workers sleep by the shipped profile of the embedded models."""
    if plan.executor != "emulated":
        yield
        return
    rows = list(csv.DictReader(io.StringIO(_PROFILE.read_text())))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "gpu": "emulated"} for row in rows)
    (folder / "profile.csv").write_text(out.getvalue())
    config = folder / "mesh.toml"
    config.write_text(
        f'[control]\nprofiles = ["{folder}/profile.csv"]\n'
        "ended_max = 1000000\n"  # each call is looked up at the end
        '[gpuworker]\ngpu = "emulated"\n'
    )
    before = os.environ.get(_CONFIG_VARIABLE)
    os.environ[_CONFIG_VARIABLE] = str(config)
    try:
        yield
    finally:
        os.environ.pop(_CONFIG_VARIABLE)
        if before is not None:
            os.environ[_CONFIG_VARIABLE] = before


async def _nothing_runs_on(running: RunningMesh, strikes: Strikes, found: ChaosResult) -> None:
    """After the mesh was stopped: no process of it lives, nobody listens at its doors."""
    alive = [pid for pid in strikes.pids if _lives(pid)]
    await eventually(lambda: not any(_lives(pid) for pid in alive), 5.0)
    alive = [pid for pid in alive if _lives(pid)]
    brokers = [url.removeprefix("nats://") for url in running.nats_url.split(",")]
    doors = [*running.gateways, running.control, *brokers]
    open_doors = await asyncio.to_thread(leftovers.listening, doors)
    found.leftovers.after |= {"processes": float(len(alive)), "ports": float(len(open_doors))}
    found.violations += [f"left over: process {pid} lives on" for pid in alive]
    found.violations += [f"left over: somebody listens at {door}" for door in open_doors]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wish_names(plan: ChaosPlan) -> list[str]:
    """What a run asks for."""
    return [_describe(wish) for wish in catalogue(plan.sizes, plan.steps)]


def _describe(wish: MediaWish) -> str:
    frames = f", {wish.frames} frames" if wish.frames > 1 else ""
    how = f", {wish.workflow}" if wish.workflow else ""
    return f"{wish.name}: {wish.side} px{frames}, {wish.steps} steps{how}"
