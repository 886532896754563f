"""`python -m bench profile`: measures the embedded models' call times on this machine, as a
profile.

Assignments are scripted, so that every degree is measured, the useless ones too. A cell is measured
with `busy` workers computing at once (as many as there are cores to fill), since that is how a
loaded mesh runs: at degree d, busy // d groups run side by side, and at least one.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import Progress

from bench.machine import machine_kind
from bench.scripted_leader import Leader, Piece, WorkerPool
from hocket.broker import free_port, nats_server_command
from hocket.bus import Bus
from hocket.v1 import generation_pb2, types_pb2

_HEADER = "model,gpu,node,width,height,frames,degree,batch,call_us,source"
_GUIDANCE = 1.5
_STEPS = 8
_WORKERS = 4


async def measure(repeats: int, busy: int, models: tuple[str, ...], console: Console) -> str:
    """The profile as CSV text, one row a (model, node, shape, degree); no model: the embedded."""
    with tempfile.TemporaryDirectory(prefix="hocket-profile-") as folder:
        port = free_port()
        broker = await asyncio.create_subprocess_exec(
            *nats_server_command(Path(folder) / "nats", port),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            url = f"nats://127.0.0.1:{port}"
            bus = await Bus.connect(url, "profile")
            with WorkerPool(url, "profile", Path(folder), models, _WORKERS):
                leader = Leader(bus, "profile", 1)
                await leader.listen(_WORKERS)
                rows = await _Measuring(leader, repeats, busy, console).rows()
            await bus.close()
        finally:
            broker.terminate()
            await broker.wait()
    source = f'"[M] median of {repeats * _STEPS} steps, {busy} busy workers; {machine_kind()}"'
    lines = [f"{row},{source}" for row in rows]
    return "\n".join([_HEADER, *lines]) + "\n"


class _Measuring:
    def __init__(self, leader: Leader, repeats: int, busy: int, console: Console) -> None:
        self._leader = leader
        self._repeats = repeats
        self._busy = busy
        self._console = console
        self._requests = 0

    async def rows(self) -> list[str]:
        beat = next(iter(self._leader.beats.values()))
        rows = []
        with Progress(console=self._console) as progress:
            models = beat.models
            cells = sum(len(m.shapes) * (2 + len(_degrees(m))) for m in models)
            task = progress.add_task("measuring", total=cells)
            for model in models:
                for shape in model.shapes:
                    for node, degree in _nodes(model):
                        head = f"{model.name},{beat.device.profile_name},{node}"
                        size = f"{shape.width},{shape.height},{max(1, shape.frames)}"
                        time_us = await self._cell(model, shape, node, degree)
                        rows.append(f"{head},{size},{degree},1,{time_us}")
                        progress.advance(task)
        return rows

    async def _cell(
        self, model: generation_pb2.ModelInfo, shape: types_pb2.Shape, node: str, degree: int
    ) -> int:
        side_by_side = max(1, min(self._busy, _WORKERS) // degree)
        names = sorted(self._leader.beats)
        groups = [tuple(names[i * degree : (i + 1) * degree]) for i in range(side_by_side)]
        times: list[int] = []
        for turn in range(self._repeats + 1):  # the first turn warms up
            got = await self._turn(model, shape, node, groups)
            times += got if turn else []
        return int(median(times))

    async def _turn(
        self,
        model: generation_pb2.ModelInfo,
        shape: types_pb2.Shape,
        node: str,
        groups: list[tuple[str, ...]],
    ) -> list[int]:
        leader, waiting, requests = self._leader, set(), []
        steps = _STEPS if node == "dit" else 1
        spec = types_pb2.GenerationSpec(
            model=model.name,
            prompt="a fox",
            shape=shape,
            steps=steps,
            guidance_scale=_GUIDANCE,
            seed=1,
        )
        branches = model.HasField("branches_above") and model.branches_above < _GUIDANCE
        for group in groups:
            self._requests += 1
            request = f"p{self._requests}"
            requests.append(request)
            member = leader.member(request, spec, 0, ())
            sequence = await leader.assign("text", Piece(1, group[:1]), member)
            if node != "text":
                held = leader.member(request, spec, 0, group[:1])
                halves = 2 if branches and len(group) % 2 == 0 else 1  # as control does
                piece = Piece(steps, group, cfg=halves)
                sequence = await leader.assign("dit", piece, held)
            if node == "vae":
                held = leader.member(request, spec, steps, group[:1])
                sequence = await leader.assign("vae", Piece(1, group[:1]), held)
            waiting.add(sequence)
        times = await leader.times(waiting)
        for request in requests:
            await leader.release(request)
        return times


def _degrees(model: generation_pb2.ModelInfo) -> list[int]:
    return [d for d in model.degrees if d <= _WORKERS]


def _nodes(model: generation_pb2.ModelInfo) -> list[tuple[str, int]]:
    return [("text", 1), *(("dit", d) for d in _degrees(model)), ("vae", 1)]
