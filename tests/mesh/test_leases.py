"""Leases: who lives, judged by control's own clock and by nothing else."""

from __future__ import annotations

from typing import Any

from control.scaling.seen_models import ModelsSeen
from control.scheduler.values import ModelFacts, NodeParts, WorkerLost, WorkerUp
from control.workers.leases import Leases
from hocket.v1 import generation_pb2, mesh_pb2, types_pb2
from hocket.workflows.roles import missing_roles

LEASE_US = 2_000_000


def beat(worker: str = "w0", incarnation: str = "a", **fields: object) -> mesh_pb2.Heartbeat:
    model = generation_pb2.ModelInfo(name="m", degrees=[1, 2])
    return mesh_pb2.Heartbeat(
        worker=worker,
        incarnation=incarnation,
        models=[model],
        device=mesh_pb2.Device(profile_name="cpu"),
        **fields,
    )


def test_a_first_heartbeat_brings_a_worker_up_and_the_next_says_nothing_new() -> None:
    leases = Leases(LEASE_US)
    (up,) = leases.heartbeat(beat(), 10)
    assert isinstance(up, WorkerUp) and up.at_us == 10 and up.gpu == "cpu"
    assert up.models == (ModelFacts(name="m", degrees=(1, 2)),), "no batches, no memory: not yet"
    assert up.models[0].batch_max == 1 and up.memory_mib == 0
    assert leases.heartbeat(beat(), 20) == ()


def test_a_model_says_which_parts_its_nodes_need() -> None:
    news = beat("w1", memory=memory(part="t5"))
    for node, part in (("text", "clip"), ("dit", "d"), ("text", "t5")):
        news.models[0].parts.add(node=node, part=part)
    (up,) = Leases(LEASE_US).heartbeat(news, 10)
    assert isinstance(up, WorkerUp) and [part.part for part in up.weights] == ["t5"]
    assert up.models[0].parts == (
        NodeParts(node="text", parts=("clip", "t5")),
        NodeParts(node="dit", parts=("d",)),
    )


def test_workers_of_one_role_each_serve_a_model_together() -> None:
    leases, seen = Leases(LEASE_US), ModelsSeen(kept_us=LEASE_US)
    beats = []
    for worker, operations in (("w0", ["encode_prompt"]), ("w1", ["denoise"])):
        news = beat(worker)
        news.models[0].operations.extend(operations)
        news.models[0].parts.add(node=worker, part=worker)
        beats.append(news)
        leases.heartbeat(news, 10)
        seen.see(beats, 10)
    (model,) = leases.models()
    assert list(model.operations) == ["encode_prompt", "denoise"]
    assert [part.part for part in model.parts] == ["w1", "w0"]
    assert missing_roles(model) == ("vae",) and missing_roles(seen.listed()[0]) == ("vae",)
    changes = seen.changes
    seen.see(beats, 20)
    assert seen.changes == changes, "nothing is new: nothing is stored"
    seen.see(beats[:1], 30)
    seen.see((), 40)
    (asleep,) = seen.asleep().values()
    assert missing_roles(asleep) == ("vae",), "it wakes as it was, not as its last worker was"


def test_a_worker_says_that_it_obeys_layouts_or_it_does_not() -> None:
    news = beat("w1")
    news.models[0].obeys_layout = True
    leases = Leases(LEASE_US)
    (old,), (new,) = leases.heartbeat(beat(), 10), leases.heartbeat(news, 10)
    assert isinstance(old, WorkerUp) and isinstance(new, WorkerUp)
    assert (old.models[0].halves, new.models[0].halves) == (False, True)


def test_a_lease_ends_exactly_when_it_is_due() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    assert leases.next_expiry_us() == LEASE_US
    assert leases.expire(LEASE_US - 1) == ()
    (lost,) = leases.expire(LEASE_US)
    assert lost == WorkerLost(at_us=LEASE_US, worker="w0", reason="lease")
    assert not leases.alive


def test_time_in_which_control_was_held_up_counts_for_nobody() -> None:
    """It should look every 200 ms; once it did for 1.5 s not: the workers have as long."""
    leases = Leases(LEASE_US)
    leases.look(0)
    leases.heartbeat(beat(), 100_000)
    leases.look(200_000)
    leases.look(1_700_000)
    due_us = 100_000 + 1_300_000 + LEASE_US
    assert leases.next_expiry_us() == due_us and leases.expire(due_us - 1) == ()
    leases.look(2_100_000)  # a little late is no gap
    assert leases.next_expiry_us() == due_us
    leases.looked(4_000_000)  # what it did then took long: that was no pause
    leases.look(4_200_000)
    assert leases.next_expiry_us() == due_us


def test_a_dead_worker_is_excused_for_one_lease_at_most() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    for now_us in range(0, 10 * LEASE_US, LEASE_US):
        leases.look(now_us)
    assert leases.next_expiry_us() == 2 * LEASE_US
    leases.heartbeat(beat(), 10 * LEASE_US)
    leases.look(11 * LEASE_US)
    assert leases.next_expiry_us() == 12 * LEASE_US, "a heartbeat begins anew"


def test_a_goodbye_ends_it_at_once() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    (lost,) = leases.heartbeat(beat(leaving=True), 5)
    assert isinstance(lost, WorkerLost) and lost.reason == "leaving"
    assert leases.heartbeat(beat("stranger", leaving=True), 5) == ()


def test_a_suspect_is_cleared_by_its_next_heartbeat() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    leases.suspect("w0")
    (up,) = leases.heartbeat(beat(), 5)
    assert isinstance(up, WorkerUp)
    assert not leases.alive["w0"].suspect


def memory(budget: int = 100 << 20, load_us: int = 50_000, **part: Any) -> types_pb2.Memory:
    facts = {"size_bytes": (10 << 20) + 1, "peak_bytes": 12 << 20, "resident": True, **part}
    weights = types_pb2.PartWeights(model="m", node="dit", load_time_us=load_us, **facts)
    return types_pb2.Memory(budget_bytes=budget, parts=[weights])


def test_a_worker_with_bounded_memory_tells_of_its_weights() -> None:
    (up,) = Leases(LEASE_US).heartbeat(beat(memory=memory()), 0)
    assert isinstance(up, WorkerUp) and up.memory_mib == 100
    (part,) = up.weights
    assert (part.mib, part.peak_mib, part.load_us, part.resident) == (11, 12, 50_000, True)
    (up,) = Leases(LEASE_US).heartbeat(beat(memory=memory(budget=0)), 0)
    assert isinstance(up, WorkerUp) and (up.memory_mib, up.weights) == (0, ())


def test_only_sizes_and_times_that_matter_are_news() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(memory=memory()), 0)
    for same in (memory(load_us=60_000), memory(load_us=30_000), memory(resident=False)):
        assert leases.heartbeat(beat(memory=same), 1) == ()
    assert leases.heartbeat(beat(memory=memory(load_us=200_000)), 2)
    assert leases.heartbeat(beat(memory=memory(load_us=200_000)), 3) == ()
    assert leases.heartbeat(beat(memory=memory(load_us=200_000, peak_bytes=20 << 20)), 4)
    leases.heartbeat(beat(memory=memory(load_us=1)), 5)
    assert leases.heartbeat(beat(memory=memory(load_us=19_000)), 6) == (), "too short to matter"
