"""`python -m bench overheads`: what pausing, moving and resizing a job costs, in its own steps.

Two real workers and a broker; assignments are scripted and sent ahead, as control sends them. A
seam is the time from the end of the step before to the end of the step behind, beyond what such a
step takes (the median of its half): joining the group, fetching the latent, cold caches.

    paused    [A xn][B xm][A xn]            both seams; B's steps count not
    moved     [A xn on w0][A xn on w1]      the seam
    widened   [A xn on w0][A xn on both]    the seam; narrowed likewise
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.progress import Progress

from bench.mesh.request_cost import MeshFindings
from bench.mesh.scripted_leader import Leader, Piece, WorkerPool
from hocket.clock import steady_ns
from hocket.launching.broker import free_port, nats_server_command
from hocket.messaging.bus import Bus
from hocket.tracing.interruptions import DENOISER
from hocket.tracing.span_file import read_spans
from hocket.tracing.spans import NODE, REQUEST, STEP
from hocket.v1 import generation_pb2, types_pb2

_CLUSTER = "overheads"
_HALF, _OTHER = 5, 2  # steps of each half of a job, and of the job that overtakes it
_AIM = ("p50", 0.2)
_TIMEOUT_US = 120_000_000  # pieces wait for each other
_SPANS_S = 10.0
_POLL_S = 0.02
_TURNS_MAX = 40
W0, W1 = ("w0",), ("w1",)
BOTH = ("w0", "w1")


@dataclass
class _Bench:
    leader: Leader
    traces: Path
    requests: int = 0
    asked: dict[str, int] = field(default_factory=dict)  # denoising steps by request

    async def prepare(
        self, model: generation_pb2.ModelInfo, shape: types_pb2.Shape, steps: int
    ) -> tuple[str, types_pb2.GenerationSpec]:
        """A job that has been encoded on w0."""
        self.requests += 1
        request = f"o{self.requests}"
        spec = types_pb2.GenerationSpec(
            model=model.name,
            prompt=model.examples[0] if model.examples else "a fox",
            shape=shape,
            steps=steps,
            guidance_scale=model.guidance_default,
            seed=self.requests,
        )
        sequence = await self.leader.assign(
            "text", Piece(1, W0), self.leader.member(request, spec, 0, ())
        )
        await self.leader.times({sequence})
        return request, spec

    async def run(self, pieces: Sequence[tuple[str, types_pb2.GenerationSpec, Piece]]) -> None:
        """Sends all pieces at once, waits for their ends."""
        done: dict[str, int] = {}
        where: dict[str, tuple[str, ...]] = {}
        sequences = set()
        for request, spec, piece in pieces:
            first = done.get(request, 0)
            member = self.leader.member(request, spec, first, where.get(request, W0))
            sequences.add(await self.leader.assign("dit", piece, member, timeout_us=_TIMEOUT_US))
            done[request], where[request] = first + piece.steps, piece.workers
        self.asked.update(done)
        await self.leader.times(sequences)
        for request in done:
            await self.leader.release(request)

    async def steps_us(self, *requests: str) -> list[list[tuple[int, int]]]:
        """(start, end) of every denoising step in microseconds, by request."""
        async with asyncio.timeout(_SPANS_S):
            while True:
                found: dict[str, list[tuple[int, int]]] = {r: [] for r in requests}
                for span in read_spans(self.traces):
                    request = str(span.attributes.get(REQUEST))
                    denoises = span.name == STEP and span.attributes.get(NODE) == DENOISER
                    if denoises and request in found:
                        found[request].append(
                            (span.start_unix_ns // 1000, span.end_unix_ns // 1000)
                        )
                if all(len(found[r]) == self.asked[r] for r in requests):
                    return [sorted(found[r]) for r in requests]
                await asyncio.sleep(_POLL_S)


async def measure(turns: int, seconds: float, progress: Progress) -> MeshFindings:
    """Costs by model and shape, in steps of the job that is disturbed.

    So many turns a shape at least, and so many as there is time for in so many seconds.
    """
    found = MeshFindings()
    with tempfile.TemporaryDirectory(prefix="hocket-overheads-") as folder:
        port = free_port()
        broker = await asyncio.create_subprocess_exec(
            *nats_server_command(Path(folder) / "nats", port),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            url = f"nats://127.0.0.1:{port}"
            bus = await Bus.connect(url, _CLUSTER)
            with WorkerPool(url, _CLUSTER, Path(folder), (), len(BOTH)):
                leader = Leader(bus, _CLUSTER, 1)
                await leader.listen(len(BOTH))
                bench = _Bench(leader, Path(folder) / "traces")
                await _models(bench, turns, seconds, found, progress)
            await bus.close()
        finally:
            broker.terminate()
            await broker.wait()
    return found


async def _models(
    bench: _Bench, turns: int, seconds: float, found: MeshFindings, progress: Progress
) -> None:
    models = next(iter(bench.leader.beats.values())).models
    cells = [(model, shape) for model in models for shape in model.shapes]
    task = progress.add_task("pausing, moving, resizing", total=len(cells))
    for model, shape in cells:
        costs: dict[str, list[float]] = {}
        began_ns = steady_ns()
        for turn in range(max(turns, _TURNS_MAX) + 1):  # the first one warms up
            if turn > turns and steady_ns() - began_ns > seconds * 1e9:
                break
            one = await _turn(bench, model, shape)
            if turn:
                for name, cost in one.items():
                    costs.setdefault(name, []).append(cost)
        progress.advance(task)
        size = f"{shape.width}x{shape.height}" + (f"x{shape.frames}" if shape.frames > 1 else "")
        for name, values in costs.items():
            found.add(f"{name}, {size}", "steps", values, _AIM)


async def _turn(
    bench: _Bench, model: generation_pb2.ModelInfo, shape: types_pb2.Shape
) -> dict[str, float]:
    halves = Piece(_HALF, BOTH, cfg=2 if model.HasField("branches_above") else 1)
    half = Piece(_HALF, W0)
    paused, a = await bench.prepare(model, shape, 2 * _HALF)
    overtaker, b = await bench.prepare(model, shape, _OTHER)
    await bench.run([(paused, a, half), (overtaker, b, Piece(_OTHER, W0)), (paused, a, half)])
    moved, _ = await bench.prepare(model, shape, 2 * _HALF)
    await bench.run([(moved, a, half), (moved, a, Piece(_HALF, W1))])
    wider, _ = await bench.prepare(model, shape, 2 * _HALF)
    await bench.run([(wider, a, half), (wider, a, halves)])
    narrower, _ = await bench.prepare(model, shape, 2 * _HALF)
    await bench.run([(narrower, a, halves), (narrower, a, half)])
    paused_us, overtaker_us, moved_us, wider_us, narrower_us = await bench.steps_us(
        paused, overtaker, moved, wider, narrower
    )
    overtaken_us = overtaker_us[-1][1] - paused_us[_HALF - 1][1]
    begun_us = overtaker_us[0][0] - paused_us[_HALF - 1][1]
    return {
        "pause and resume": _seam(paused_us, overtaken_us - begun_us),
        "move to another worker": _seam(moved_us),
        "widen from 1 to 2": _seam(wider_us),
        "narrow from 2 to 1": _seam(narrower_us),
    }


def _seam(steps_us: Sequence[tuple[int, int]], others_us: int = 0) -> float:
    """Between the halves, in steps of the second; `others_us` in between were another job's."""
    before, after = steps_us[:_HALF], steps_us[_HALF:]
    step_us = median(end - start for start, end in after)
    return (after[0][1] - before[-1][1] - others_us - step_us) / step_us
