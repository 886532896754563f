"""Two real workers on a real bus, and whoever plays control: it sends assignments, and listens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.struct_pb2 import Value

from gpuworker.collectives.rendezvous import Rendezvous
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.worker_pool import Pool

WAIT_S = 60.0
LARGE = (28, 28)  # of the requests
STEPS = 4


def given(port: str, artifact: str, version: int = 0, *holders: Any) -> mesh_pb2.NodeInput:
    """An input that another node has made; without holders: whoever made it last."""
    return mesh_pb2.NodeInput(port=port, artifact=artifact, version=version, holders=holders)


def settings(**values: float | str) -> dict[str, Value]:
    return {
        name: Value(string_value=v) if isinstance(v, str) else Value(number_value=v)
        for name, v in values.items()
    }


@dataclass
class Mesh:
    """Two workers, and whoever plays control."""

    bus: Bus
    subjects: Subjects
    workers: tuple[str, str]
    addresses: dict[str, str]
    model: str
    prompt: str
    pool: Pool
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    reports: list[mesh_pb2.StepReport] = field(default_factory=list)
    beats: dict[str, mesh_pb2.Heartbeat] = field(default_factory=dict)
    sequence: int = 0
    _heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        async def report(message: mesh_pb2.StepReport) -> None:
            self.reports.append(message)
            self._heard.set()

        async def beat(message: mesh_pb2.Heartbeat) -> None:
            self.beats[message.worker] = message
            self._heard.set()

        await self.bus.subscribe(self.subjects.report("*"), mesh_pb2.StepReport, report)
        await self.bus.subscribe(self.subjects.heartbeat("*"), mesh_pb2.Heartbeat, beat)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._heard.clear()
                await self._heard.wait()

    def holder(self, worker: str, steps_done: int = 0) -> types_pb2.LatentHolder:
        return types_pb2.LatentHolder(
            worker=worker, steps_done=steps_done, store_address=self.addresses[worker]
        )

    def call(
        self,
        op: str,
        output: str,
        size: tuple[int, int],
        inputs: Sequence[mesh_pb2.NodeInput],
        **values: float | str,
    ) -> mesh_pb2.NodeCall:
        shape = types_pb2.Shape(width=size[0], height=size[1], frames=1)
        return mesh_pb2.NodeCall(
            op=op,
            model=self.model,
            shape=shape,
            inputs=inputs,
            outputs=[output],
            settings=settings(**values),
        )

    def order(
        self,
        workers: Sequence[str],
        calls: dict[str, mesh_pb2.NodeCall],
        *,
        first: int = 0,
        count: int = 1,
        total: int = 0,
    ) -> mesh_pb2.Assignment:
        """One assignment, of a job for each request."""
        self.sequence += 1
        batch = [
            mesh_pb2.BatchMember(
                request_id=request,
                spec=types_pb2.GenerationSpec(
                    model=self.model,
                    workflow="two-pass",
                    prompt=self.prompt,
                    shape=types_pb2.Shape(width=LARGE[0], height=LARGE[1], frames=1),
                    steps=STEPS,
                    guidance_scale=3.5,
                    seed=7,
                    media_type="image/png",
                ),
                call=call,
                first_step=first,
                steps_total=total,
            )
            for request, call in calls.items()
        ]
        return mesh_pb2.Assignment(
            term=1,
            sequence=self.sequence,
            node=next(iter(calls.values())).outputs[0].partition(".")[0],
            batch=batch,
            steps=count,
            group=types_pb2.Group(epoch=self.pool.next_epoch(), members=workers),
            layout=types_pb2.Layout(cfg=1, ulysses=len(workers), ring=1),
            rendezvous_address=self.addresses[workers[0]],
            collective_timeout_us=20_000_000,
        )

    async def send(self, *orders: mesh_pb2.Assignment) -> None:
        for worker in self.workers:
            mine = [order for order in orders if worker in order.group.members]
            if mine:
                message = mesh_pb2.Assign(term=1, assignments=mine)
                await self.bus.publish(self.subjects.assign(worker), message)

    def of(self, order: mesh_pb2.Assignment) -> list[mesh_pb2.StepReport]:
        return [report for report in self.reports if report.sequence == order.sequence]

    async def done(self, *orders: mesh_pb2.Assignment) -> list[mesh_pb2.StepReport]:
        """The last report of each."""
        await self.send(*orders)
        found = []
        for order in orders:
            await self.until(lambda o=order: any(report.last for report in self.of(o)))
            found.append(next(report for report in self.of(order) if report.last))
        return found

    async def artifact(self, worker: str, name: str, version: int = 0, request: str = "r") -> bytes:
        """What a worker holds, as another worker gets it."""
        asked = mesh_pb2.LatentRequest(request_id=request, steps_done=version, artifact=name)
        subject = self.subjects.latent(worker)
        reply = await self.bus.request(subject, asked, mesh_pb2.LatentReply, 5_000_000)
        assert not reply.HasField("failure"), reply.failure
        return await asyncio.to_thread(
            self.rendezvous.fetch, self.addresses[worker], reply.key, WAIT_S, asyncio.Event()
        )
