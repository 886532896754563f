"""A scripted leader: real workers, a real broker, and a script that says which steps run where.

It takes control's place on the bus (its own term, its own sequence numbers) and publishes
assignments by hand, so that tests and profiles can drive any degree schedule through the very
worker that serves users.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpuworker.collectives.rendezvous import Rendezvous
from gpuworker.state import LatentState
from hocket.messaging.bus import Bus, Feed, Subjects
from hocket.v1 import mesh_pb2, types_pb2

WAIT_S = 90.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Piece:
    """Some steps on an ordered list of workers: cfg x ring x Ulysses, which is the rest."""

    steps: int
    workers: tuple[str, ...]
    cfg: int = 1
    ring: int = 1


@dataclass
class WorkerPool:
    """Worker processes started by the command that users run."""

    url: str
    cluster: str
    state_dir: Path
    models: tuple[str, ...]
    count: int = 4
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WorkerPool:
        command = [sys.executable, "-m", "gpuworker", f"--count={self.count}", "--name-prefix=w"]
        command += [f"--nats-url={self.url}", f"--cluster={self.cluster}"]
        command += [f"--state-dir={self.state_dir}", "--device=cpu", "--log-level=error"]
        command += [f"--model={model}" for model in self.models]
        command += self.options
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT_S)

    def kill(self, worker: str) -> None:
        """kill -9 of one worker."""
        os.kill(self.pid(worker), signal.SIGKILL)

    def pid(self, worker: str) -> int:
        """Of one worker: the pool's n-th child, in order of forking, or the one process itself."""
        assert self.process is not None
        if self.count == 1:
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = sorted(int(pid) for pid in children.read_text().split())
        return pids[int(worker.removeprefix("w"))]


@dataclass
class Leader:
    """Control's voice on the bus, spoken by a script."""

    bus: Bus
    cluster: str
    term: int
    beats: dict[str, mesh_pb2.Heartbeat] = field(default_factory=dict)
    sequence: int = 0
    reports: Feed[mesh_pb2.StepReport] | None = None

    async def listen(self, workers: int) -> None:
        """Returns once that many workers have been heard."""
        heard = await self.bus.follow(self.subjects.heartbeat("*"), mesh_pb2.Heartbeat)
        self.reports = await self.bus.follow(self.subjects.report("*"), mesh_pb2.StepReport)
        async with asyncio.timeout(WAIT_S):
            while len(self.beats) < workers:
                beat = await heard.next()
                self.beats[beat.worker] = beat
        await heard.close()

    @property
    def subjects(self) -> Subjects:
        return Subjects(self.cluster)

    async def assign(
        self,
        node: str,
        piece: Piece,
        *batch: mesh_pb2.BatchMember,
        epoch: int = 1,
        timeout_us: int = 20_000_000,
    ) -> int:
        """Publishes one assignment to all its workers; returns its sequence number."""
        self.sequence += 1
        assignment = mesh_pb2.Assignment(
            sequence=self.sequence,
            node=node,
            batch=batch,
            steps=piece.steps,
            group=types_pb2.Group(epoch=self.term * 1000 + epoch, members=piece.workers),
            layout=types_pb2.Layout(
                cfg=piece.cfg,
                ulysses=len(piece.workers) // (piece.cfg * piece.ring),
                ring=piece.ring,
            ),
            term=self.term,
            rendezvous_address=self.beats[piece.workers[0]].store_address,
            predicted_step_time_us=100_000,
            collective_timeout_us=timeout_us,
        )
        message = mesh_pb2.Assign(term=self.term, assignments=[assignment])
        for worker in piece.workers:
            await self.bus.publish(self.subjects.assign(worker), message)
        return self.sequence

    def member(
        self,
        request: str,
        spec: types_pb2.GenerationSpec,
        first_step: int,
        holders: Sequence[str],
        attempt: int = 0,
    ) -> mesh_pb2.BatchMember:
        return mesh_pb2.BatchMember(
            request_id=request,
            first_step=first_step,
            steps_total=spec.steps,
            attempt=attempt,
            holders=[
                types_pb2.LatentHolder(
                    worker=holder,
                    steps_done=first_step,
                    store_address=self.beats[holder].store_address,
                )
                for holder in holders
            ],
            spec=spec,
        )

    async def run(
        self, request: str, spec: types_pb2.GenerationSpec, pieces: Sequence[Piece]
    ) -> None:
        """Encodes on the first piece's first worker and publishes all pieces at once."""
        holders: tuple[str, ...] = (pieces[0].workers[0],)
        await self.assign("text", Piece(1, holders), self.member(request, spec, 0, ()))
        first = 0
        for piece in pieces:
            await self.assign("dit", piece, self.member(request, spec, first, holders))
            first, holders = first + piece.steps, piece.workers

    async def ending(self, sequence: int) -> mesh_pb2.StepReport:
        """The last report of an assignment."""
        assert self.reports is not None
        async with asyncio.timeout(WAIT_S):
            while True:
                report = await self.reports.next()
                if report.sequence == sequence and (report.last or report.HasField("failure")):
                    return report

    async def results(self, sequence: int) -> dict[str, mesh_pb2.StepResult]:
        """The newest result of each job of an assignment, once it is over."""
        assert self.reports is not None
        found: dict[str, mesh_pb2.StepResult] = {}
        async with asyncio.timeout(WAIT_S):
            while True:
                report = await self.reports.next()
                if report.sequence == sequence:
                    assert not report.HasField("failure"), report.failure.message
                    found.update({result.request_id: result for result in report.results})
                    if report.last:
                        return found

    async def times(self, sequences: set[int]) -> list[int]:
        """Step times (µs) of these assignments, once all of them have ended."""
        assert self.reports is not None
        waiting, found = set(sequences), []
        async with asyncio.timeout(WAIT_S):
            while waiting:
                report = await self.reports.next()
                assert not report.HasField("failure"), report.failure.message
                if report.sequence in sequences:
                    found += list(report.step_time_us)
                    waiting -= {report.sequence} if report.last else set()
        return found

    async def progress(self, sequence: int, at_least: int) -> None:
        """Returns once an assignment's jobs have that many steps behind them."""
        assert self.reports is not None
        async with asyncio.timeout(WAIT_S):
            while True:
                report = await self.reports.next()
                if report.sequence == sequence and report.results[0].steps_done >= at_least:
                    return

    async def truncate(self, request: str, stop_at_step: int, attempt: int) -> None:
        message = mesh_pb2.Truncate(
            term=self.term, request_id=request, attempt=attempt, stop_at_step=stop_at_step
        )
        for worker in self.beats:
            await self.bus.publish(self.subjects.truncate(worker), message)

    async def latent(self, request: str, holder: str, steps_done: int) -> LatentState:
        """Fetches a latent from its holder, as another worker would."""
        reply = await self.bus.request(
            self.subjects.latent(holder),
            mesh_pb2.LatentRequest(
                request_id=request, steps_done=steps_done, wait_us=int(WAIT_S * 1e6)
            ),
            mesh_pb2.LatentReply,
            int(WAIT_S * 1e6),
        )
        assert reply.key, reply.failure.message
        store = Rendezvous("127.0.0.1")
        try:
            blob = await asyncio.to_thread(
                store.fetch, self.beats[holder].store_address, reply.key, WAIT_S
            )
        finally:
            store.close()
        return LatentState.from_bytes(blob)

    async def release(self, request: str) -> None:
        message = mesh_pb2.Assign(term=self.term, released=[request])
        for worker in self.beats:
            await self.bus.publish(self.subjects.assign(worker), message)
