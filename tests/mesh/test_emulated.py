"""The emulated executor on a manual clock, without a broker: attempts that resume, truncations,
what the host remembers, and the profile that it needs.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gpuworker.__main__ import EXECUTORS
from gpuworker.emulation.executor import EmulatedExecutor, EmulatedHost
from gpuworker.emulation.host import WEIGHTLESS_US
from gpuworker.emulation.worker import read_profile
from gpuworker.executor import RunNote
from hocket.clock import ManualClock
from hocket.errors import WrongConfig
from hocket.v1 import mesh_pb2, types_pb2

ROOT = Path(__file__).parents[2]
STEP_US = 1000
STEPS = 8
LOOP_PASSES = 30  # of the event loop: enough for whatever one message sets off


class Cluster:
    """Three emulated workers and their notes."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.host = EmulatedHost(self.clock, {})
        self.notes: list[RunNote] = []
        self.workers = {
            name: EmulatedExecutor(name, self.host, "cpu") for name in ("w0", "w1", "w2")
        }
        for worker in self.workers.values():
            worker.start(self.notes.append)
            worker.accept_term(1)

    async def settle(self) -> None:
        """Lets everything happen that belongs to this instant."""
        for _ in range(LOOP_PASSES):
            await asyncio.sleep(0)

    async def play(self) -> None:
        """Lets time run until nobody waits for it."""
        await self.settle()
        while (next_us := self.clock.next_wake_us()) is not None:
            self.clock.advance_to(next_us)
            await self.settle()

    async def steps(self, count: int) -> None:
        """Lets time run by so many steps, or none."""
        await self.settle()
        for _ in range(count):
            self.clock.advance_to(self.clock.now_us() + STEP_US)
            await self.settle()

    def assign(self, assignment: mesh_pb2.Assignment, *, to: Sequence[str] = ()) -> None:
        """Hands an assignment to its members, or to some of them."""
        for worker in to or assignment.group.members:
            self.workers[worker].submit(assignment)

    def truncate(self, attempt: int) -> None:
        mark = mesh_pb2.Truncate(term=1, request_id="r", attempt=attempt)
        for worker in self.workers.values():
            worker.truncate(mark)

    def news(self, sequence: int) -> list[tuple[int | None, bool]]:
        """(steps done, last) of an assignment's notes."""
        return [(n.steps_done, n.last) for n in self.notes if n.assignment.sequence == sequence]

    def held(self, worker: str) -> dict[str, int]:
        return {h.request_id: h.steps_done for h in self.workers[worker].held()}

    @property
    def busy(self) -> bool:
        return any(worker.pending() for worker in self.workers.values())


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    for worker in made.workers.values():
        await worker.close()
    assert not made.host.meetings and not made.host.copies


def order(
    sequence: int,
    node: str,
    members: Sequence[str],
    first: int = 0,
    steps: int = 1,
    holders: Sequence[str] = (),
    attempt: int = 0,
    term: int = 1,
    requests: Sequence[str] = ("r",),
) -> mesh_pb2.Assignment:
    batch = [
        mesh_pb2.BatchMember(
            request_id=request,
            first_step=first,
            steps_total=STEPS,
            attempt=attempt,
            holders=[types_pb2.LatentHolder(worker=name, steps_done=first) for name in holders],
            spec=types_pb2.GenerationSpec(model="m", steps=STEPS),
        )
        for request in requests
    ]
    return mesh_pb2.Assignment(
        sequence=sequence,
        node=node,
        batch=batch,
        steps=steps,
        group=types_pb2.Group(members=members),
        term=term,
        predicted_step_time_us=STEP_US,
    )


async def test_every_member_keeps_a_copy(cluster: Cluster) -> None:
    cluster.assign(order(1, "text", ["w0"]))
    cluster.assign(order(2, "dit", ["w0", "w1"], steps=3, holders=["w0"]))
    await cluster.play()
    assert cluster.news(2) == [(1, False), (2, False), (3, True)]
    own = [step.members_us for note in cluster.notes for step in note.steps]
    assert own == [(), *[(STEP_US, STEP_US)] * 3], "nobody waits for anybody"
    assert [cluster.held(name) for name in ("w0", "w1", "w2")] == [{"r": 3}, {"r": 3}, {}]
    assert not cluster.busy


async def test_a_new_attempt_resumes_from_a_latent_that_survived(cluster: Cluster) -> None:
    """Steps that the first attempt made count for the second one."""
    cluster.assign(order(1, "text", ["w0"]))
    cluster.assign(order(2, "dit", ["w0", "w1"], steps=STEPS, holders=["w0"]))
    await cluster.steps(3)  # the encoding, and two steps
    cluster.truncate(attempt=0)
    await cluster.play()
    assert cluster.news(2)[-1] == (3, True), "the step in hand ends, and is the last"
    cluster.assign(order(3, "dit", ["w2"], first=3, steps=5, holders=["w1"], attempt=1))
    cluster.assign(order(4, "vae", ["w2"], first=8, holders=["w2"], attempt=1))
    await cluster.play()
    assert cluster.news(3)[-1] == (8, True)
    assert cluster.news(4) == [(8, True)]
    assert not cluster.busy


async def test_who_is_called_off_leaves_the_batch_and_the_others_go_on(cluster: Cluster) -> None:
    both = ("r", "s")
    cluster.assign(order(1, "text", ["w0"], requests=both))
    cluster.assign(order(2, "dit", ["w0", "w1"], steps=4, holders=["w0"], requests=both))
    await cluster.steps(3)  # the encoding, and two steps
    cluster.truncate(attempt=0)  # of r
    await cluster.play()
    last = cluster.notes[-1]
    assert last.last and last.behind == {"s": 4}
    assert cluster.held("w1") == {"r": 3, "s": 4}, "the step in hand was made"
    assert not cluster.busy


async def test_only_a_named_holder_with_the_named_steps_will_do(cluster: Cluster) -> None:
    cluster.assign(order(1, "text", ["w0"]))
    cluster.assign(order(2, "dit", ["w0"], steps=4, holders=["w0"]))
    await cluster.play()
    cluster.assign(order(3, "dit", ["w1"], first=3, holders=["w0"]))  # it has four behind it
    cluster.assign(order(4, "dit", ["w2"], first=4, holders=["w1"]))  # that one has none
    await cluster.play()
    assert cluster.news(3) == [(None, True)], "what is no more is not waited for"
    assert cluster.news(4) == [] and cluster.busy
    cluster.truncate(attempt=0)
    await cluster.play()
    assert cluster.news(4) == [(4, True)]
    assert not cluster.busy


def call(
    sequence: int,
    op: str,
    output: str,
    inputs: dict[str, tuple[str, int, str]],
    members: Sequence[str],
    first: int = 0,
    steps: int = 1,
) -> mesh_pb2.Assignment:
    """A workflow's; `inputs`: artifact, version and holder by port."""
    made = order(sequence, output.partition(".")[0], members, first, steps)
    named = [
        mesh_pb2.NodeInput(
            port=port,
            artifact=artifact,
            version=version,
            holders=[types_pb2.LatentHolder(worker=holder)],
        )
        for port, (artifact, version, holder) in inputs.items()
    ]
    made.batch[0].call.CopyFrom(mesh_pb2.NodeCall(op=op, inputs=named, outputs=[output]))
    return made


async def test_a_workflow_of_two_passes_takes_its_artifacts_by_name(cluster: Cluster) -> None:
    text = call(1, "encode_prompt", "text.embeddings", {}, ["w0"])
    embeddings = ("text.embeddings", 0, "w0")
    first = call(2, "denoise", "a.latents", {"embeddings": embeddings}, ["w0"], 0, 3)
    begin = {"embeddings": embeddings, "latents": ("a.latents", 3, "w0")}
    second = call(3, "denoise", "b.latents", begin, ["w1", "w0"], 0, 2)
    further = {"latents": ("b.latents", 2, "w1")}
    rest = call(4, "denoise", "b.latents", further, ["w2"], 2, 1)
    latents = ("b.latents", 3, "w2")
    image = call(5, "decode", "c.image", {"latents": latents}, ["w2"], first=3)
    media = call(6, "make_media", "d.media", {"image": ("c.image", 0, "w2")}, ["w0"])
    for assignment in (text, first, second, rest, image, media):
        cluster.assign(assignment)
    await cluster.play()
    ends = [n for n in cluster.notes if n.last]
    assert [n.assignment.sequence for n in ends] == [1, 2, 3, 4, 5, 6]
    assert [n.steps_done for n in ends] == [0, 3, 2, 3, 3, 0] and list(ends[-1].media) == ["r"]
    held = {(h.artifact, h.steps_done) for h in cluster.workers["w0"].held()}
    passes = {("a.latents", 3), ("b.latents", 2)}
    assert held == {("text.embeddings", 0), ("c.image", 0), *passes}
    decode = ends[4].steps[0].duration_us, ends[5].steps[0].duration_us
    assert decode == (STEP_US, WEIGHTLESS_US)
    # A version that nobody has: which artifact, and whom it was asked of.
    lost = call(7, "decode", "e.image", {"latents": ("a.latents", 2, "w0")}, ["w1"])
    lost.collective_timeout_us = 1
    cluster.assign(lost)
    await cluster.play()
    failed = cluster.notes[-1]
    assert failed.failure is not None and failed.failure.reason == "LATENT_MISSING"
    assert failed.failed_job is not None and failed.failed_job.artifact == "a.latents"
    for worker in cluster.workers.values():
        worker.release("r")
        assert not worker.held()


async def test_a_truncation_frees_who_waits_for_a_member(cluster: Cluster) -> None:
    """Whichever member it is that never comes."""
    cluster.assign(order(1, "text", ["w0"]))
    cluster.assign(order(2, "dit", ["w0", "w1"], holders=["w0"]), to=["w0"])
    cluster.assign(order(3, "dit", ["w1", "w2"], holders=["w0"]), to=["w2"])
    await cluster.play()
    assert cluster.workers["w0"].pending() == (2,) and cluster.workers["w2"].pending() == (3,)
    cluster.truncate(attempt=0)
    await cluster.play()
    assert not cluster.busy
    cluster.assign(order(4, "dit", ["w2", "w0"], steps=2, holders=["w0"], attempt=1))
    await cluster.play()
    assert cluster.news(4) == [(1, False), (2, True)]


async def test_a_newer_term_frees_who_waits_in_an_older_one(cluster: Cluster) -> None:
    """Sequence numbers begin anew with a term: an old meeting is never taken for a new one."""
    cluster.assign(order(1, "text", ["w0"]))
    cluster.assign(order(2, "dit", ["w0", "w1"], holders=["w0"]), to=["w1"])
    await cluster.play()
    for worker in cluster.workers.values():
        worker.accept_term(2)
    cluster.assign(order(2, "dit", ["w0", "w1"], steps=2, holders=["w0"], term=2))
    await cluster.play()
    assert cluster.news(2) == [(1, False), (2, True)]
    assert not cluster.busy and not cluster.host.meetings


async def test_the_host_forgets_what_is_over(cluster: Cluster) -> None:
    cluster.assign(order(1, "text", ["w0"]))
    for sequence in range(2, 2 + STEPS):
        first = sequence - 2
        cluster.assign(
            order(sequence, "dit", ["w0", "w1", "w2"], first=first, holders=["w0", "w2"])
        )
    await cluster.play()
    assert cluster.news(1 + STEPS) == [(STEPS, True)]
    assert not cluster.host.meetings and not cluster.host.waiting
    for worker in cluster.workers.values():
        worker.release("r")
    assert not any(cluster.host.copies.values())


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe", "model,node\nm,dit\n"])
def test_a_profile_that_cannot_be_used_is_named(
    content: str | bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "profile.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WrongConfig) as caught:
        read_profile(path)
    assert caught.value.key == "profile" and str(path) in caught.value.value


def test_the_command_explains_a_missing_profile() -> None:
    command = [sys.executable, "-m", "gpuworker", "--executor=emulated", "--profile=/nonexist"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "profile = '/nonexist'" in run.stderr and "No such file" in run.stderr


def test_each_executor_names_a_module_of_this_tree() -> None:
    assert EXECUTORS.keys() == {"torch", "emulated"}
    for module in EXECUTORS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
