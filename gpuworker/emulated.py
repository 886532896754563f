"""The emulated executor: keeps the torch executor's manners and sleeps by a profile instead of
computing.

For tests and load runs of the control plane with up to thousands of workers; never a stand-in for a
test of a worker. All emulated workers of one process share an `EmulatedHost`, which plays the part
of groups and latents: an assignment starts when all its members have come to it and its latent
exists.
"""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from gpuworker.executor import Listener, RunNote, StepNote
from gpuworker.inbox import Inbox, StopMark
from hocket.clock import Clock
from hocket.errors import WrongConfig
from hocket.v1 import generation_pb2, mesh_pb2, types_pb2

Cell = tuple[str, str, int, int, int, int]  # model, node, width, height, frames, degree


def profile_cells(lines: Iterable[str], name: str) -> dict[Cell, int]:
    """Call times (µs) of batch 1, by cell, of a profile CSV; raises WrongConfig naming the line."""
    cells: dict[Cell, int] = {}
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            if int(row["batch"]) != 1:
                continue
            shape = (int(row["width"]), int(row["height"]), int(row["frames"]))
            cell = (row["model"], row["node"], *shape, int(row["degree"]))
            cells[cell] = int(row["call_us"])
        except (KeyError, ValueError) as error:
            raise WrongConfig(
                key="profile", value=f"{name}:{number}", allowed=f"a profile row ({error!r})"
            ) from error
    return cells


@dataclass
class EmulatedHost:
    """What the emulated workers of one process share."""

    clock: Clock
    profile: dict[Cell, int]
    steps_done: dict[tuple[str, int], int] = field(default_factory=dict)  # by request, attempt
    joined: dict[int, set[str]] = field(default_factory=dict)  # members at an assignment
    finished: set[int] = field(default_factory=set)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def step_time_us(self, assignment: mesh_pb2.Assignment) -> int:
        spec = assignment.batch[0].spec
        shape = (spec.shape.width, spec.shape.height, max(1, spec.shape.frames))
        degree = len(assignment.group.members)
        cell = (spec.model, assignment.node, *shape, degree)
        return self.profile.get(cell, assignment.predicted_step_time_us)

    def models(self) -> tuple[generation_pb2.ModelInfo, ...]:
        """The models of the profile, with every profiled shape and degree."""
        infos = []
        for name in sorted({cell[0] for cell in self.profile}):
            dit = [c for c in self.profile if c[0] == name and c[1] == "dit"]
            shapes = sorted({c[2:5] for c in dit})
            video = any(frames > 1 for _, _, frames in shapes)
            infos.append(
                generation_pb2.ModelInfo(
                    name=name,
                    family="emulated",
                    workflows=["txt2vid" if video else "txt2img"],
                    shapes=[types_pb2.Shape(width=w, height=h, frames=f) for w, h, f in shapes],
                    steps_min=1,
                    steps_max=1000,
                    steps_default=28,
                    guidance_kind="embedded",
                    guidance_max=100.0,
                    guidance_default=3.5,
                    degrees=sorted({c[5] for c in dit}),
                )
            )
        return tuple(infos)


class EmulatedExecutor:
    """One emulated worker."""

    def __init__(self, worker: str, host: EmulatedHost, gpu: str, *, media: bool = True) -> None:
        self._worker = worker
        self._host = host
        self._media = media
        self._inbox = Inbox()
        self._arrived = asyncio.Event()
        self._held: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self.models = host.models()
        self.store_address = f"emulated/{worker}"
        self._gpu = gpu

    @property
    def device(self) -> mesh_pb2.Device:
        name = f"emulated {self._gpu}"
        return mesh_pb2.Device(kind="emulated", profile_name=self._gpu, name=name)

    def start(self, listener: Listener) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(listener))

    def accept_term(self, term: int) -> bool:
        return self._inbox.accept_term(term)

    def submit(self, assignment: mesh_pb2.Assignment) -> None:
        self._inbox.put(assignment)
        self._arrived.set()

    def truncate(self, truncate: mesh_pb2.Truncate) -> None:
        mark = StopMark(truncate.attempt, truncate.stop_at_step)
        self._inbox.truncate(truncate.request_id, mark)
        if truncate.release:
            self.release(truncate.request_id)
        self._arrived.set()

    def release(self, request: str) -> None:
        self._held.pop(request, None)
        for key in [k for k in self._host.steps_done if k[0] == request]:
            del self._host.steps_done[key]

    def held(self) -> tuple[mesh_pb2.HeldLatent, ...]:
        return tuple(
            mesh_pb2.HeldLatent(request_id=request, steps_done=steps)
            for request, steps in self._held.items()
        )

    def progress(self) -> tuple[int, int]:
        return self._inbox.term, self._inbox.sequence

    def pending(self) -> tuple[int, ...]:
        return self._inbox.pending()

    async def offer_latent(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        return mesh_pb2.LatentReply(
            failure=types_pb2.Failure(reason="EMULATED", message="emulated workers hold no latents")
        )

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, listener: Listener) -> None:
        while True:
            assignment = self._inbox.take_ready()
            if assignment is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                leads = assignment.group.members[0] == self._worker
                await (self._lead(assignment, listener) if leads else self._follow(assignment))
                self._inbox.done(assignment)

    async def _lead(self, assignment: mesh_pb2.Assignment, listener: Listener) -> None:
        host, member = self._host, assignment.batch[0]
        await self._gather(assignment)
        first = member.first_step
        step_us, began_us = host.step_time_us(assignment), host.clock.now_us()
        done = first
        for step in range(first, first + assignment.steps):
            if self._inbox.must_stop(member.request_id, member.attempt, step):
                break
            await host.clock.sleep_until(began_us + (step - first + 1) * step_us)
            done = step + 1
            ended = assignment.node != "dit" or done == first + assignment.steps
            self._keep(assignment, done)
            listener(self._note(assignment, step, done, step_us, last=ended))
        if done == first:
            listener(RunNote(assignment=assignment, steps_done=first, last=True))
        elif done < first + assignment.steps and assignment.node == "dit":
            listener(RunNote(assignment=assignment, steps_done=done, last=True))
        async with host.changed:
            host.finished.add(assignment.sequence)
            host.joined.pop(assignment.sequence, None)
            host.changed.notify_all()

    async def _follow(self, assignment: mesh_pb2.Assignment) -> None:
        host = self._host
        async with host.changed:
            host.joined.setdefault(assignment.sequence, set()).add(self._worker)
            host.changed.notify_all()
            await host.changed.wait_for(lambda: assignment.sequence in host.finished)

    async def _gather(self, assignment: mesh_pb2.Assignment) -> None:
        """Waits for the other members and for the latent to start from."""
        host, member = self._host, assignment.batch[0]
        others = set(assignment.group.members[1:])
        key = (member.request_id, member.attempt)
        need = -1 if assignment.node == "text" else member.first_step

        def ready() -> bool:
            here = host.joined.get(assignment.sequence, set()) >= others
            off = self._inbox.must_stop(member.request_id, member.attempt, member.first_step)
            return here and (off or need < 0 or host.steps_done.get(key, -1) >= need)

        async with host.changed:
            await host.changed.wait_for(ready)

    def _keep(self, assignment: mesh_pb2.Assignment, done: int) -> None:
        member = assignment.batch[0]
        steps = 0 if assignment.node == "text" else done
        if assignment.node != "vae":
            self._held[member.request_id] = steps
            self._host.steps_done[member.request_id, member.attempt] = steps

    def _note(
        self, assignment: mesh_pb2.Assignment, step: int, done: int, step_us: int, *, last: bool
    ) -> RunNote:
        now_ns = self._host.clock.now_us() * 1000
        steps_done = done
        if assignment.node != "dit":
            steps_done = assignment.batch[0].first_step
        content = info = None
        if assignment.node == "vae" and self._media:
            content = _blank_png()
            info = types_pb2.MediaInfo(media_type="image/png", width=8, height=8, frames=1)
        return RunNote(
            assignment=assignment,
            steps_done=steps_done,
            steps=(StepNote(step, now_ns - step_us * 1000, now_ns, step_us),),
            last=last,
            media=content,
            media_info=info,
        )


def _blank_png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()
