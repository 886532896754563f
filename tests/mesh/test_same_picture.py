"""Same picture: whatever degrees, moves and crashes happen on the way, the final latent is that of
the plain diffusers loop with the same seed, in float32, within 1e-4.

Real worker processes, a real broker, a scripted leader in control's place.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from bench.mesh.scripted_leader import Leader, Piece, WorkerPool
from gpuworker.config import EMBEDDED_MODEL
from gpuworker.measuring.reference import Reference
from hocket.messaging.bus import Bus
from hocket.v1 import types_pb2

WORKERS = ("w0", "w1", "w2", "w3")
STEPS, SIDE, GUIDANCE = 8, 64, 2.0
TOLERANCE = 1e-4
_terms = itertools.count(1)


@pytest.fixture(scope="module")
def pool(nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    state = tmp_path_factory.mktemp("pool")
    with WorkerPool(nats_url, "same-picture", state, (str(EMBEDDED_MODEL),)) as workers:
        yield workers


@pytest.fixture
async def leader(nats_url: str, pool: WorkerPool) -> AsyncIterator[Leader]:
    bus = await Bus.connect(nats_url, "leader")
    scripted = Leader(bus, pool.cluster, next(_terms))
    await scripted.listen(pool.count)
    yield scripted
    await bus.close()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.load()


def spec(seed: int) -> types_pb2.GenerationSpec:
    return types_pb2.GenerationSpec(
        model="hocket-emoji",
        prompt="a fox on a green background",
        shape=types_pb2.Shape(width=SIDE, height=SIDE, frames=1),
        steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=seed,
    )


def drawn_schedule(seed: int) -> list[Piece]:
    """A random schedule: pieces of 1 to 3 steps on 1, 2 or 4 workers in any order."""
    draw = random.Random(seed)
    pieces, left = [], STEPS
    while left:
        steps = min(left, draw.randint(1, 3))
        members = draw.sample(WORKERS, draw.choice((1, 2, 4)))
        pieces.append(Piece(steps, tuple(members)))
        left -= steps
    return pieces


def pieces(*groups: str) -> list[Piece]:
    """Equal pieces on groups written as digits: "0", "01", "0123"."""
    share = STEPS // len(groups)
    steps = [share] * (len(groups) - 1) + [STEPS - share * (len(groups) - 1)]
    return [
        Piece(n, tuple(f"w{digit}" for digit in group))
        for n, group in zip(steps, groups, strict=True)
    ]


NAMED = {
    "all on one": pieces("0"),
    "1-2-4-2-1": pieces("0", "01", "0123", "23", "3"),
    "disjoint moves": pieces("0", "1", "23", "01"),
    "wide all along": pieces("0123"),
}
SCHEDULES = {**NAMED, **{f"drawn with seed {seed}": drawn_schedule(seed) for seed in range(6)}}


@pytest.mark.parametrize("name", SCHEDULES)
async def test_final_latent_is_that_of_the_plain_loop(
    name: str, leader: Leader, reference: Reference
) -> None:
    schedule, seed = SCHEDULES[name], 7
    await leader.run(name.replace(" ", "-"), spec(seed), schedule)
    state = await leader.latent(name.replace(" ", "-"), schedule[-1].workers[0], STEPS)
    plain, _ = reference.denoise(spec(seed).prompt, SIDE, seed, STEPS, GUIDANCE)
    assert difference(state.tensors["latents"], plain) <= TOLERANCE, f"{name}: {schedule}"


HALVES = [
    Piece(2, ("w0",)),
    Piece(3, ("w2", "w1"), cfg=2),
    Piece(3, ("w0", "w1", "w3", "w2"), cfg=2),
]


async def test_halves_of_guidance_on_different_workers(
    leader: Leader, reference: Reference
) -> None:
    steps = sum(piece.steps for piece in HALVES)
    asked = spec(7)
    asked.steps = steps
    await leader.run("halves", asked, HALVES)
    state = await leader.latent("halves", "w3", steps)
    plain, _ = reference.denoise(asked.prompt, SIDE, 7, steps, GUIDANCE)
    assert difference(state.tensors["latents"], plain) <= TOLERANCE


@pytest.mark.parametrize("workers", [("w1",), ("w1", "w3")])
async def test_a_batch_steps_together_and_each_job_ends_as_alone(
    leader: Leader, reference: Reference, workers: tuple[str, ...]
) -> None:
    """Jobs of three requests, one of them steps ahead; encoded, stepped and decoded together."""
    names = [f"{name}-{len(workers)}" for name in ("first", "second", "ahead")]
    firsts, here = (0, 0, 3), workers[0]
    members = [leader.member(n, spec(seed), 0, ()) for seed, n in enumerate(names)]
    texts = await leader.ending(await leader.assign("text", Piece(1, (here,)), *members))
    assert [result.request_id for result in texts.results] == names
    ahead = leader.member(names[2], spec(2), 0, (here,))
    await leader.ending(await leader.assign("dit", Piece(3, (here,)), ahead))
    batch = [leader.member(n, spec(seed), firsts[seed], (here,)) for seed, n in enumerate(names)]
    piece = Piece(STEPS - 3, workers, cfg=len(workers))
    over = await leader.ending(await leader.assign("dit", piece, *batch))
    behind = {result.request_id: result.steps_done for result in over.results}
    assert behind == dict(zip(names, (STEPS - 3, STEPS - 3, STEPS), strict=True))
    for seed, name in enumerate(names):
        state = await leader.latent(name, workers[-1], behind[name])
        plain, _ = reference.denoise(
            spec(seed).prompt, SIDE, seed, STEPS, GUIDANCE, stop_after=behind[name]
        )
        assert difference(state.tensors["latents"], plain) <= TOLERANCE, name
    decoded = [leader.member(n, spec(seed), behind[n], (here,)) for seed, n in enumerate(names)]
    made = await leader.results(await leader.assign("vae", Piece(1, (here,)), *decoded))
    assert {name: result.media.object_name for name, result in made.items()} == {
        name: name for name in names
    }
    assert len({result.media.sha256 for result in made.values()}) == len(names)


async def test_one_job_that_is_called_off_leaves_its_batch(
    leader: Leader, reference: Reference
) -> None:
    """On every member of the group after the same step; the other one's latent is its own."""
    names = ("kept", "off")
    members = [leader.member(n, spec(seed), 0, ()) for seed, n in enumerate(names)]
    await leader.ending(await leader.assign("text", Piece(1, ("w0",)), *members))
    await leader.truncate("off", stop_at_step=2, attempt=0)
    batch = [leader.member(n, spec(seed), 0, ("w0",)) for seed, n in enumerate(names)]
    over = await leader.results(await leader.assign("dit", Piece(STEPS, ("w0", "w1")), *batch))
    assert {name: result.steps_done for name, result in over.items()} == {"kept": STEPS, "off": 2}
    for name, seed, steps in (("kept", 0, STEPS), ("off", 1, 2)):
        state = await leader.latent(name, "w1", steps)
        plain, _ = reference.denoise(
            spec(seed).prompt, SIDE, seed, STEPS, GUIDANCE, stop_after=steps
        )
        assert difference(state.tensors["latents"], plain) <= TOLERANCE, name


async def test_comparison_sees_another_seed(leader: Leader, reference: Reference) -> None:
    await leader.run("planted", spec(7), pieces("0"))
    state = await leader.latent("planted", "w0", STEPS)
    other, _ = reference.denoise(spec(8).prompt, SIDE, 8, STEPS, GUIDANCE)
    assert difference(state.tensors["latents"], other) > 0.1


async def test_same_schedule_gives_equal_bytes(leader: Leader) -> None:
    latents = []
    for turn in ("first", "second"):
        await leader.run(turn, spec(3), NAMED["1-2-4-2-1"])
        latents.append(await leader.latent(turn, "w3", STEPS))
    assert torch.equal(latents[0].tensors["latents"], latents[1].tensors["latents"])


async def test_truncation_settles_on_one_step_for_all_members(
    leader: Leader, reference: Reference
) -> None:
    """A group told to stop stops after the same step everywhere; the rest runs elsewhere."""
    request = "truncated"
    await leader.assign("text", Piece(1, ("w0",)), leader.member(request, spec(5), 0, ()))
    member = leader.member(request, spec(5), 0, ("w0",))
    await leader.truncate(request, stop_at_step=3, attempt=0)
    sequence = await leader.assign("dit", Piece(STEPS, ("w0", "w1")), member)
    stopped = await leader.ending(sequence)
    assert stopped.results[0].steps_done == 3
    rest = leader.member(request, spec(5), 3, ("w1",), attempt=1)
    await leader.assign("dit", Piece(STEPS - 3, ("w2",)), rest)
    state = await leader.latent(request, "w2", STEPS)
    plain, _ = reference.denoise(spec(5).prompt, SIDE, 5, STEPS, GUIDANCE)
    assert difference(state.tensors["latents"], plain) <= TOLERANCE


async def test_a_killed_worker_costs_steps_and_no_picture(
    nats_url: str, tmp_path: Path, reference: Reference
) -> None:
    """kill -9 in the middle of a group's steps: the survivor says so, and the rest is redone."""
    bus = await Bus.connect(nats_url, "leader")
    with WorkerPool(nats_url, "killed", tmp_path, (str(EMBEDDED_MODEL),), 3) as workers:
        leader = Leader(bus, "killed", 1)
        await leader.listen(3)
        request, steps = "killed", 100
        long = spec(9)
        long.steps = steps
        await leader.assign("text", Piece(1, ("w0",)), leader.member(request, long, 0, ()))
        member = leader.member(request, long, 0, ("w0",))
        sequence = await leader.assign("dit", Piece(steps, ("w0", "w1")), member)
        await leader.progress(sequence, at_least=3)
        workers.kill("w1")
        failed = await leader.ending(sequence)
        assert failed.failure.reason == "GROUP_LOST" and failed.worker == "w0"
        done = failed.results[0].steps_done
        assert 3 <= done < steps
        rest = leader.member(request, long, done, ("w0",), attempt=1)
        await leader.assign("dit", Piece(STEPS, ("w0", "w2")), rest, epoch=2)
        state = await leader.latent(request, "w2", done + STEPS)
    await bus.close()
    plain, _ = reference.denoise(long.prompt, SIDE, 9, steps, GUIDANCE, stop_after=done + STEPS)
    assert difference(state.tensors["latents"], plain) <= TOLERANCE


async def test_a_group_whose_member_never_comes_is_given_up(leader: Leader) -> None:
    """A truncation frees a worker that waits for a peer; its next assignment runs."""
    request = "never"
    await leader.assign("text", Piece(1, ("w0",)), leader.member(request, spec(5), 0, ()))
    member = leader.member(request, spec(5), 0, ("w0",))
    leader.beats["absent"] = leader.beats["w1"]
    sequence = await leader.assign("dit", Piece(1, ("w0", "absent")), member)
    await leader.truncate(request, stop_at_step=0, attempt=0)
    failed = await leader.ending(sequence)
    assert failed.failure.reason == "GROUP_LOST"
    await leader.run("after", spec(5), pieces("0"))
    await leader.latent("after", "w0", STEPS)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.flatten() - theirs.flatten()).abs().max())


def test_schedules_are_drawn_the_same_everywhere() -> None:
    assert drawn_schedule(1) == drawn_schedule(1)
    assert {len(p.workers) for s in range(20) for p in drawn_schedule(s)} == {1, 2, 4}
