"""Batches in a real engine: one leaves, fails or is missing, and the others never notice."""

from __future__ import annotations

import pytest

from gpuworker.state import LatentState
from gpuworker.steps.run import Run
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.engine_tasks import Order, Told, run_engine
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE
from tests.worker.worker_pool import Pool

ALL = ("a", "b", "c")


@pytest.fixture
def steps(flux: Reference) -> int:
    """Of each job."""
    return int(flux.settings["steps"])


def assignment(
    flux: Reference,
    sequence: int,
    node: str,
    workers: tuple[str, ...],
    requests: tuple[str, ...] = ALL,
    *,
    first: int = 0,
    count: int = 1,
    address: str = "",
    epoch: int = 1,
) -> bytes:
    """Jobs of one shape with a seed each; the first worker holds their latents."""
    s = flux.settings
    members = []
    for request in requests:
        spec = types_pb2.GenerationSpec(
            model="tiny",
            prompt=s["prompt"],
            shape=types_pb2.Shape(width=s["width"], height=s["height"], frames=1),
            steps=s["steps"],
            guidance_scale=s["guidance_scale"],
            seed=ord(request),
            media_type="image/png",
        )
        holder = types_pb2.LatentHolder(worker=workers[0], steps_done=first)
        members.append(
            mesh_pb2.BatchMember(
                request_id=request,
                spec=spec,
                first_step=first,
                steps_total=s["steps"],
                holders=[] if node == "text" else [holder],
            )
        )
    made = mesh_pb2.Assignment(
        sequence=sequence,
        node=node,
        batch=members,
        steps=count,
        term=1,
        group=types_pb2.Group(epoch=epoch, members=workers),
        layout=types_pb2.Layout(cfg=1, ulysses=len(workers), ring=1),
        rendezvous_address=address,
        collective_timeout_us=20_000_000,
    )
    return made.SerializeToString()


def whole(flux: Reference, worker: str, requests: tuple[str, ...] = ALL) -> tuple[bytes, ...]:
    """Encode, all steps, decode."""
    total = int(flux.settings["steps"])
    return (
        assignment(flux, 1, "text", (worker,), requests),
        assignment(flux, 2, "dit", (worker,), requests, count=total),
        assignment(flux, 3, "vae", (worker,), requests, first=total),
    )


@pytest.fixture(scope="module")
def solo() -> dict[str, bytes]:
    """Latents of jobs that ran alone."""
    return {}


def latents_alone(pool: Pool, flux: Reference, solo: dict[str, bytes], request: str) -> bytes:
    """The request's last latent where it has no company."""
    if request not in solo:
        worker = pool.names[0]
        order = Order(flux.folder, whole(flux, worker, (request,))[:2])
        solo[request] = pool.one(worker, run_engine, order)[1][request]
    return solo[request]


def same(ours: bytes, theirs: bytes) -> bool:
    """The contract's tolerance."""
    mine, others = (LatentState.from_bytes(b).tensors["latents"] for b in (ours, theirs))
    return float((mine - others).abs().max()) <= LATENT_TOLERANCE


def of(notes: list[Told], sequence: int) -> list[Told]:
    return [note for note in notes if note.sequence == sequence]


def test_who_is_called_off_leaves_at_a_step_and_the_others_go_on(
    pool: Pool, flux: Reference, solo: dict[str, bytes], steps: int
) -> None:
    worker = pool.names[0]
    order = Order(flux.folder, whole(flux, worker), stops=(("b", 3),))
    notes, states = pool.one(worker, run_engine, order)
    told = of(notes, 2)
    assert [note.last for note in told][-1] and not any(note.reason for note in told)
    assert {r: told[-1].behind[r] for r in "ac"} == {"a": steps, "c": steps}
    assert max(note.behind["b"] for note in told if "b" in note.behind) == 3
    assert LatentState.from_bytes(states["b"]).steps_done == 3
    for mate in "ac":
        assert same(states[mate], latents_alone(pool, flux, solo, mate))
    assert [note.media for note in of(notes, 3) if note.media] == [("a",), ("c",)]


@pytest.mark.parametrize("knows", [0, 1])
def test_the_first_member_settles_who_leaves(
    pool: Pool, flux: Reference, solo: dict[str, bytes], steps: int, knows: int
) -> None:
    """A truncation that reached one member of a group only: all stay together all the same."""
    workers = tuple(pool.names[:2])
    epoch, address = pool.next_epoch(), pool.address(workers[0])
    dit = assignment(flux, 2, "dit", workers, count=steps, address=address, epoch=epoch)
    for place, worker in enumerate(workers):
        mine = (assignment(flux, 1, "text", (worker,)), dit)
        stops = (("a", 3), ("c", 5)) if place == knows else ()
        pool.start(worker, run_engine, Order(flux.folder, mine, stops=stops))
    (notes, first), (quiet, second) = (pool.result(worker) for worker in workers)
    assert not of(quiet, 2) and of(notes, 2)[-1].last
    stands = {r: LatentState.from_bytes(state).steps_done for r, state in first.items()}
    heard = knows == 0
    assert stands == {"a": 3 if heard else steps, "b": steps, "c": 5 if heard else steps}
    assert first == second, "members agree to the bit"
    assert same(first["b"], latents_alone(pool, flux, solo, "b"))


def test_a_job_whose_latent_is_nowhere_is_named_and_left_behind(
    pool: Pool, flux: Reference, solo: dict[str, bytes], steps: int
) -> None:
    worker = pool.names[0]
    two = (
        assignment(flux, 1, "text", (worker,)),
        assignment(flux, 2, "dit", (worker,), count=1),
        assignment(flux, 3, "dit", (worker,), first=1, count=steps - 1),
    )
    order = Order(flux.folder, two, lacking=("b",))
    notes, states = pool.one(worker, run_engine, order)
    failed, *_, done = of(notes, 3)
    assert (failed.reason, failed.last) == ("LATENT_MISSING", False)
    assert failed.request == "b" and not failed.behind
    assert done.last and done.behind == {"a": steps, "c": steps}
    for mate in "ac":
        assert same(states[mate], latents_alone(pool, flux, solo, mate))


@pytest.mark.parametrize("lacking", ["source", "member"])
def test_a_latent_that_a_group_misses_is_nobody_s_loss(
    pool: Pool, flux: Reference, steps: int, lacking: str
) -> None:
    """All members say LATENT_MISSING and who was asked; the same group runs the next assignment.

    The plan believes the latent of `z` on the first member alone, which broadcasts it, or on both,
    of which nobody broadcasts, while the second has none.
    """
    workers = tuple(pool.names[:2])
    epoch, address = pool.next_epoch(), pool.address(workers[0])
    both = lacking == "member"
    lost = mesh_pb2.Assignment.FromString(
        assignment(flux, 2, "dit", workers, ("z",), address=address, epoch=epoch)
    )
    if both:
        lost.batch[0].holders.append(types_pb2.LatentHolder(worker=workers[1], steps_done=0))
    more = assignment(flux, 3, "dit", workers, count=steps, address=address, epoch=epoch)
    for worker in workers:
        encoded = ALL + (("z",) if both and worker == workers[0] else ())
        mine = (assignment(flux, 1, "text", (worker,), encoded), lost.SerializeToString(), more)
        pool.start(worker, run_engine, Order(flux.folder, mine))
    results = [pool.result(worker) for worker in workers]
    told = [of(notes, 2) for notes, _ in results]
    done = of(results[0][0], 3)[-1]
    assert done.last and done.behind == dict.fromkeys(ALL, steps), "the group stands"
    blamed = workers[1] if both else workers[0]
    for (failed,) in told:
        assert (failed.reason, failed.request, failed.last) == ("LATENT_MISSING", "z", True)
        assert (failed.tried, failed.suspects) == ((blamed,), ())


@pytest.mark.parametrize("lacking", ["source", "member"])
def test_the_others_of_a_group_s_batch_go_on_without_what_is_missing(
    pool: Pool, flux: Reference, solo: dict[str, bytes], steps: int, lacking: str
) -> None:
    workers = tuple(pool.names[:2])
    epoch, address = pool.next_epoch(), pool.address(workers[0])
    both = lacking == "member"
    dit = mesh_pb2.Assignment.FromString(
        assignment(flux, 2, "dit", workers, count=steps, address=address, epoch=epoch)
    )
    if both:
        for member in dit.batch:
            member.holders.append(types_pb2.LatentHolder(worker=workers[1], steps_done=0))
    for worker in workers:
        lacks = worker == (workers[1] if both else workers[0])
        encoded = ("a", "c") if lacks else ALL
        mine = (assignment(flux, 1, "text", (worker,), encoded), dit.SerializeToString())
        pool.start(worker, run_engine, Order(flux.folder, mine))
    (notes, first), (quiet, second) = (pool.result(worker) for worker in workers)
    missing, *_, done = of(notes, 2)
    assert (missing.reason, missing.request, missing.last) == ("LATENT_MISSING", "b", False)
    assert done.last and done.behind == {"a": steps, "c": steps} and not of(quiet, 2)
    for mate in "ac":
        assert first[mate] == second[mate]
        assert same(first[mate], latents_alone(pool, flux, solo, mate))


def test_a_job_that_cannot_be_decoded_is_named_and_left_behind(pool: Pool, flux: Reference) -> None:
    worker = pool.names[0]
    order = Order(flux.folder, whole(flux, worker), broken=("b",))
    notes, _ = pool.one(worker, run_engine, order)
    a, b, c = of(notes, 3)
    assert a.media == ("a",) and not a.last
    assert (b.reason, b.request, b.last) == ("MODEL_ERROR", "b", False)
    assert c.media == ("c",) and c.last


def test_a_decode_keeps_what_it_made_when_a_mate_is_called_off(pool: Pool, flux: Reference) -> None:
    worker = pool.names[0]
    stops = (("c", "a"),)
    order = Order(flux.folder, whole(flux, worker), stops_in_decode=stops)
    notes, _ = pool.one(worker, run_engine, order)
    a, b, closing = of(notes, 3)
    assert (a.media, b.media) == (("a",), ("b",)) and not (a.last or b.last)
    assert closing.last and not closing.behind and not closing.reason


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_members_read_the_word_alike(size: int) -> None:
    names = [f"r{i}" for i in range(size)]
    batch = [mesh_pb2.BatchMember(request_id=name) for name in names]
    order = mesh_pb2.Assignment(batch=batch)
    for staying in (names, names[:1], names[1:], names[::2], []):
        first, other = Run(order), Run(order)
        word = first.word(staying)
        assert -(2**63) <= word < 2**63
        assert first.obey(word, 1) == other.obey(word, 1) == bool(staying)
        stay = staying or names
        assert [m.request_id for m in first.members] == [m.request_id for m in other.members]
        assert [m.request_id for m in other.members] == stay
