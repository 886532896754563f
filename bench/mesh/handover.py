"""`python -m bench.mesh.handover`: what it gains to fetch inputs beside the compute thread.

Two real torch workers and a broker; assignments are scripted and sent at once, as control sends
them ahead. Every request is denoised on one worker and decoded on the other, so that each decode's
latents move. A share of the transfers is late. The same load runs on workers that fetch in turn and
on workers that fetch ahead, in pairs whose order alternates; the figure is the throughput of the
second over that of the first. Then the store alone: time and CPU of a transfer between two
processes, by size, against a file in shared memory with a checksum.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bench.mesh.scripted_leader import ROOT, WAIT_S, Leader, Piece
from bench.reporting.statistics import mean_interval
from gpuworker.collectives.rendezvous import Rendezvous
from hocket.clock import steady_ns
from hocket.launching.broker import free_port, nats_server_command
from hocket.messaging.bus import Bus
from hocket.v1 import types_pb2

_SIZES = tuple(1 << power for power in range(16, 27, 2))  # 64 KiB .. 64 MiB
_WORKERS = ("w0", "w1")


class WorkerPair:
    """Two workers and who leads them."""

    def __init__(self, url: str, ahead: int, late_ms: float, share: float, state: Path) -> None:
        self.url, self.cluster = url, f"handover{ahead}"
        self._arguments = [url, self.cluster, str(state), str(ahead), str(late_ms), str(share)]
        self._processes: list[asyncio.subprocess.Process] = []
        self._requests = 0
        self.leader: Leader

    async def open(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.leader = Leader(await Bus.connect(self.url, "leader"), self.cluster, 1)
        for name in _WORKERS:
            command = [sys.executable, "-m", "bench.mesh.jittery_worker", name, *self._arguments]
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment)
            self._processes.append(process)
        await self.leader.listen(len(_WORKERS))

    async def close(self) -> None:
        for process in self._processes:
            process.terminate()
            await process.wait()
        await self.leader.bus.close()

    async def load(self, requests: int, spec: types_pb2.GenerationSpec) -> float:
        """Requests a second."""
        leader, waiting = self.leader, set()
        names = [f"r{self._requests + n}" for n in range(requests)]
        self._requests += requests
        began_ns = steady_ns()
        for number in range(requests + 2):
            if number < requests:
                at = (_WORKERS[number % 2],)
                member = leader.member(names[number], spec, 0, ())
                waiting.add(await leader.assign("text", Piece(1, at), member))
                member = leader.member(names[number], spec, 0, at)
                waiting.add(await leader.assign("dit", Piece(spec.steps, at), member))
            if number >= 2:  # its denoising is behind it by then, or about to be
                made, at = _WORKERS[number % 2], (_WORKERS[1 - number % 2],)
                member = leader.member(names[number - 2], spec, spec.steps, (made,))
                waiting.add(await leader.assign("vae", Piece(1, at), member))
        await leader.times(waiting)
        took_s = (steady_ns() - began_ns) / 1e9
        for name in names:
            await leader.release(name)
        return requests / took_s


async def compared(
    rounds: int, requests: int, size: int, steps: int, late_ms: float, share: float
) -> dict[str, Any]:
    """Throughput of workers that fetch ahead over that of workers that fetch in turn."""
    found: dict[int, list[float]] = {0: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="hocket-handover-") as name:
        folder, port = Path(name), free_port()
        broker = await asyncio.create_subprocess_exec(
            *nats_server_command(folder / "nats", port),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        url = f"nats://127.0.0.1:{port}"
        pairs = {
            depth: WorkerPair(url, depth, late_ms, share, folder / str(depth)) for depth in found
        }
        try:
            for pair in pairs.values():
                await pair.open()
            model = next(iter(pairs[0].leader.beats.values())).models[0]
            spec = types_pb2.GenerationSpec(
                model=model.name,
                prompt=model.examples[0],
                shape=types_pb2.Shape(width=size, height=size, frames=1),
                steps=steps,
                guidance_scale=model.guidance_default,
                media_type="image/png",
            )
            for number in range(-1, rounds):
                for depth in (0, 2) if number % 2 else (2, 0):
                    rate = await pairs[depth].load(requests, spec)
                    if number >= 0:
                        found[depth].append(rate)
        finally:
            for pair in pairs.values():
                await pair.close()
            broker.terminate()
            await broker.wait()
    logs = [math.log(two / none) for none, two in zip(found[0], found[2], strict=True)]
    found_ratio = mean_interval(logs)
    return {
        "size_px": size,
        "steps": steps,
        "requests": requests,
        "late_ms": late_ms,
        "late_share": share,
        "rounds": rounds,
        "in_turn_per_s": [round(rate, 2) for rate in found[0]],
        "ahead_per_s": [round(rate, 2) for rate in found[2]],
        "ratio": round(math.exp(found_ratio.mean), 4),
        "ratio_95": [round(math.exp(end), 4) for end in (found_ratio.low, found_ratio.high)],
    }


# The store alone. A child holds, this process fetches.

_HOLD = """
import sys, time
from gpuworker.collectives.rendezvous import Rendezvous
store = Rendezvous()
print(store.address, flush=True)
for line in sys.stdin:
    size, path = line.split()
    blob, began = b"x" * int(size), time.process_time()
    if path == "-":
        store.put("b", blob)
    else:
        with open(path, "wb") as file:
            file.write(blob)
    print(time.process_time() - began, flush=True)
    sys.stdin.readline()
    store.drop("b")
    print(time.process_time() - began, flush=True)
"""


def transfers(times: int) -> list[dict[str, Any]]:
    """By size and way: seconds from the holder's put to the last byte here, and CPU of both."""
    held = subprocess.Popen(
        [sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdin is not None and held.stdout is not None
    address, store, found = held.stdout.readline().strip(), Rendezvous(), []
    path = Path("/dev/shm") / f"hocket-handover-{os.getpid()}"
    for size in _SIZES:
        for way in ("store", "shared memory"):
            took, used = [], []
            for _ in range(times):
                began, cpu = steady_ns(), time.process_time()
                print(size, "-" if way == "store" else path, file=held.stdin, flush=True)
                held.stdout.readline()
                blob = store.fetch(address, "b", WAIT_S) if way == "store" else _read(path)
                took.append((steady_ns() - began) / 1e9)
                mine = time.process_time() - cpu
                assert len(blob) == size
                print(file=held.stdin, flush=True)
                used.append(mine + float(held.stdout.readline()))
            found.append(_transfer(size, way, took, used))
    held.stdin.close()
    held.wait(WAIT_S)
    path.unlink(missing_ok=True)
    store.close()
    return found


def _read(path: Path) -> bytes:
    """With a checksum, as a hand-over by file would need one."""
    blob = path.read_bytes()
    zlib.crc32(blob)
    return blob


def _transfer(size: int, way: str, took: Sequence[float], used: Sequence[float]) -> dict[str, Any]:
    return {
        "KiB": size >> 10,
        "way": way,
        "ms": round(1e3 * median(took), 3),
        "MB_per_s": round(size / median(took) / 1e6, 1),
        "cpu_ms": round(1e3 * median(used), 3),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Pairs of loads.")] = 12,
    requests: Annotated[int, typer.Option(help="Of each load.")] = 24,
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 64,
    steps: Annotated[int, typer.Option(help="Of each request.")] = 4,
    late_ms: Annotated[float, typer.Option(help="How late a transfer is.")] = 20.0,
    share: Annotated[float, typer.Option(help="Of the transfers that are late.")] = 0.02,
    times: Annotated[int, typer.Option(help="Transfers of each size.")] = 9,
    out: Annotated[Path, typer.Option()] = ROOT / "bench/results/handover.json",
) -> None:
    """Measures both and writes them down."""
    loads = asyncio.run(compared(rounds, requests, size, steps, late_ms, share))
    told = {
        "command": f"python -m bench.mesh.handover --rounds {rounds} --requests {requests} "
        f"--size {size} --steps {steps} --late-ms {late_ms:g} --share {share:g} --times {times}",
        "loads": loads,
        "transfers": transfers(times) if times else [],
    }
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
