"""One seed from start to result."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.protobuf.message import DecodeError

from hocket.messaging.bus import Subjects
from hocket.messaging.subjects import name_of
from hocket.v1 import journal_pb2, mesh_pb2

from . import roles
from .callers import SimulatedCallers
from .faults import Fault, draw_faults, inflict
from .invariants import Problem, check
from .loop import SimulatedLoop
from .messaging.broker import Message
from .runtime import installed
from .scenario_run import JournalEnd, ScenarioRun, outcome_of
from .stories import GATEWAYS, Story, draw_burst, draw_slow, draw_stories
from .strangers import troubles
from .toy_model import CLUSTER
from .world import World

SECOND_US = 1_000_000
_TASKS_TOGETHER = 12  # some come and go all the time: only more of them count
START_US = 1000 * SECOND_US
BEGIN_US = START_US + 3 * SECOND_US // 2  # the fleet has come up, the first callers come
CONTROLS = 2
_BURSTS = _SLOW = 0.03  # of the seeds
_LED_US = SECOND_US  # a leader that leads so long has taken up what was open
_ANSWER_US = 60 * SECOND_US  # after the last fault everybody has an answer
_SETTLE_US = 20 * SECOND_US  # the grace of followers, a lease, a few checks


@dataclass(frozen=True)
class SeedResult:
    """A seed's result."""

    seed: int
    faults: tuple[str, ...]
    kinds: tuple[str, ...]  # of the faults
    problems: tuple[Problem, ...]
    requests: int
    callbacks: int
    simulated_s: float
    digest: str  # of all that was told and stored


@dataclass
class Script:
    """What shall happen."""

    stories: list[Story]
    faults: list[Fault]
    policy: str
    workers: int
    open_max: int = 10_000
    prepare: Callable[[World], None] = lambda world: None  # called before anything is started
    begin: Callable[[World], None] = lambda world: None  # called before the first request


def play(seed: int, kinds: tuple[str, ...] = ()) -> SeedResult:
    """Runs one seed. `kinds` restricts the faults."""
    rng = random.Random(seed)
    policy = rng.choice(("edf", "fixed-1"))
    open_max = rng.choice((10_000, 10_000, 3))
    workers = rng.randrange(2, 4)
    names = [f"control-{i}" for i in range(CONTROLS)] + [f"gateway-{i}" for i in range(GATEWAYS)]
    names += [f"w{i}" for i in range(workers)]
    stories = draw_stories(rng, rng.randrange(3, 9), BEGIN_US)
    faults = draw_faults(rng, names, BEGIN_US, kinds)
    if rng.random() < _BURSTS:
        stories += draw_burst(rng, BEGIN_US)
        faults = faults if rng.random() < 0.5 else []
    if rng.random() < _SLOW:
        stories.append(draw_slow(rng, BEGIN_US))
    return perform(seed, Script(stories, faults, policy, workers, open_max))


def perform(seed: int, script: Script) -> SeedResult:
    """Runs a script; the seed is for everything else that is left to chance."""
    logging.getLogger().setLevel(logging.CRITICAL)
    loop = SimulatedLoop(START_US)
    asyncio.set_event_loop(loop)
    try:
        with (
            _garbage_left(),
            tempfile.TemporaryDirectory(prefix="shell-", dir=_fast_folder()) as folder,
        ):
            run = loop.run_until_complete(_perform(seed, loop, Path(folder), script))
            problems = tuple(check(run))
            loop.run_until_complete(run.world.shut_down())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    return SeedResult(
        seed=seed,
        faults=tuple(str(fault) for fault in run.faults),
        kinds=tuple(fault.kind for fault in run.faults),
        problems=problems,
        requests=len(run.accepted),
        callbacks=loop.callbacks,
        simulated_s=(loop.now_us - loop.start_us) / 1e6,
        digest=run.digest(),
    )


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Garbage is collected behind a run, not a dozen times within it; what was there after the
    first run (modules, for the most part) is not looked through each time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        _set_aside()


@cache
def _set_aside() -> None:
    gc.freeze()


async def _perform(seed: int, loop: SimulatedLoop, folder: Path, script: Script) -> ScenarioRun:
    world = World(seed, loop, folder, policy=script.policy, open_max=script.open_max)
    script.prepare(world)
    with installed(world):
        for index in range(CONTROLS):
            world.add(f"control-{index}", roles.control(index))
        for index in range(GATEWAYS):
            world.add(f"gateway-{index}", roles.gateway(index))
        for index in range(script.workers):
            world.add(f"w{index}", roles.worker(index))
        run = ScenarioRun(
            world, script.stories, script.faults, SimulatedCallers(world, script.stories)
        )
        world.broker.taps.append(_assigns(run))
        await asyncio.sleep((BEGIN_US - START_US - 100_000) / 1e6)
        run.before = _sizes(world)
        script.begin(world)
        world.add("callers", run.callers.run).wanted = False
        await inflict(world, script.faults)
        run.healed_us = world.now_us
        await world.until(lambda: run.callers.over, _ANSWER_US)
        await _settle(run)
        _read_stored(run)
        run.held = [
            (worker, held.request_id, held.artifact or "latents")
            for worker, executor in world.executors.items()
            for held in executor.held()
        ]
        if run.undisturbed and run.faults:
            run.troubles = await troubles(world)
    return run


async def _settle(run: ScenarioRun) -> None:
    """Waits until all is as it was, and stays so when the callers are gone, and takes its sizes."""
    world, end_us = run.world, run.world.now_us + _SETTLE_US
    await world.until(lambda: _is_quiet(run), _SETTLE_US)
    await world.kill("callers")
    while True:
        await asyncio.sleep(1.0)
        run.after = _sizes(world)
        if world.now_us > end_us or all(now <= before for before, now in run.counts().values()):
            return


def _assigns(run: ScenarioRun) -> Callable[[Message], None]:
    prefix = Subjects(CLUSTER).assign("x").removesuffix("x")

    def tap(message: Message) -> None:
        if message.subject.startswith(prefix):
            try:
                assign = mesh_pb2.Assign.FromString(message.data)
            except DecodeError:
                return
            if not assign.incarnation:
                return  # a stranger's
            for item in assign.assignments:
                key = (message.subject.removeprefix(prefix), assign.term, item.sequence)
                run.assigned_us.setdefault(key, run.world.now_us)

    return tap


def _read_stored(run: ScenarioRun) -> None:
    """What the broker has stored of requests, all that ever was."""
    broker, subjects = run.world.broker, Subjects(CLUSTER)
    zero_us = broker.unix_us - run.world.now_us
    prefix = subjects.promise("x").removesuffix("x")
    for message in broker.all_of(subjects.promises_stream):
        if message.subject.startswith(prefix) and message.data:
            promise = journal_pb2.Promise.FromString(message.data)
            run.terms.append(promise.term)
            name, at_us = name_of(message.subject.removeprefix(prefix)), message.unix_us - zero_us
            if promise.HasField("ended"):
                found = JournalEnd(at_us, outcome_of(promise.ended))
                run.ended.setdefault(name, []).append(found)
            elif promise.HasField("submit"):  # else it says that the request is forgotten
                run.accepted.setdefault(name, []).append(at_us)
                if not promise.submit.request.spec.HasField("guidance_scale"):
                    run.incomplete.add(name)


def _open_promises(world: World) -> int:
    subjects = Subjects(CLUSTER)
    stream = world.broker.streams.get(subjects.promises_stream)
    pattern = subjects.promise("x").removesuffix("x") + "*"
    found = stream.matching(pattern) if stream is not None else []
    promises = (journal_pb2.Promise.FromString(message.data) for message in found)
    return sum(p.HasField("submit") and not p.HasField("ended") for p in promises)


def _is_quiet(run: ScenarioRun) -> bool:
    """Whether all is as before the first request; if it is not, it has time to become so."""
    if not run.world.is_led():
        run.led_us = None
        return False
    if run.led_us is None:
        run.led_us = run.world.now_us
    if run.world.now_us < run.led_us + _LED_US:
        return False  # what it has to do it has not begun yet
    sizes = _sizes(run.world)
    del sizes["calls"]  # of the callers, who stay
    return all(size <= run.before.get(name, 0) for name, size in sizes.items())


def _sizes(world: World) -> dict[str, int]:
    """Everything that grows with requests, by name."""
    sizes = {
        "subscriptions at the broker": world.broker.subscriptions,
        "latents on workers": sum(len(e.held()) for e in world.executors.values()),
        "assignments on workers": sum(len(e.pending()) for e in world.executors.values()),
        "open promises": _open_promises(world),
    }
    for kind in ("control", "gateway", "w"):
        members = [m for name, m in world.members.items() if name.startswith(kind)]
        tasks = sum(len(m.process.tasks()) for m in members if m.process is not None)
        sizes[f"tasks of {kind}"] = tasks // _TASKS_TOGETHER
    calls = [c for c in world.network.channels for _ in c.calls]
    sizes["calls"] = len(calls)
    return sizes


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
