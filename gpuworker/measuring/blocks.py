"""Measures the worker's building blocks between real processes: groups cold and warm, latents by
size.

`python -m gpuworker.measuring.blocks` prints one JSON object of times in ms; `make bench` lays it
out.

Two and four processes meet through a store, as workers do; no broker is involved.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
from multiprocessing.connection import Connection

import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.rendezvous import Rendezvous
from hocket.clock import steady_ns

_ROUNDS = 20
_SIZES = (64 << 10, 1 << 20, 16 << 20)
_TIMEOUT_S = 20.0


def _member(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    rendezvous = Rendezvous("127.0.0.1")
    pipe.send(rendezvous.address)
    addresses: list[str] = pipe.recv()
    groups = GroupCache(rendezvous, f"m{rank}", torch.device("cpu"), 64)
    found: dict[str, list[float]] = {}
    for size in (2, 4):
        names = tuple(f"m{i}" for i in range(size))
        for epoch in range(1, _ROUNDS + 1):
            if rank < size:
                key = f"group of {size}"
                found.setdefault(f"{key}, cold", []).append(
                    _timed(lambda e=epoch, n=names: _join(groups, e, n, addresses[0]))
                )
                found.setdefault(f"{key}, warm", []).append(
                    _timed(lambda e=epoch, n=names: _get(groups, e, n, addresses[0]))
                )
            pipe.send("round")
            pipe.recv()
    pair = groups.get(1000, ("m0", "m1"), addresses[0], _TIMEOUT_S) if rank < 2 else None
    for size in _SIZES:
        blob = os.urandom(size) if rank == 0 else b""
        for turn in range(_ROUNDS // 2):
            key = f"{size}/{turn}"
            if rank == 0:
                found.setdefault(f"offer {size} bytes", []).append(
                    _timed(lambda k=key, b=blob: rendezvous.put(k, b))
                )
            pipe.send("offered")
            pipe.recv()
            if rank == 1:
                found.setdefault(f"fetch {size} bytes", []).append(
                    _timed(lambda k=key: rendezvous.fetch(addresses[0], k, _TIMEOUT_S))
                )
            if pair is not None:
                found.setdefault(f"broadcast {size} bytes in a pair", []).append(
                    _timed(lambda b=blob: pair.broadcast_blob(b if rank == 0 else None, 0))
                )
            pipe.send("fetched")
            pipe.recv()
            rendezvous.drop(key)
    pipe.send(found)
    pipe.recv()
    groups.close()


def _join(groups: GroupCache, epoch: int, names: tuple[str, ...], address: str) -> None:
    groups.get(epoch, names, address, _TIMEOUT_S).broadcast_word(1)


def _get(groups: GroupCache, epoch: int, names: tuple[str, ...], address: str) -> None:
    groups.get(epoch, names, address, _TIMEOUT_S)


def _timed(work: object) -> float:
    began_ns = steady_ns()
    work()  # type: ignore[operator]
    return (steady_ns() - began_ns) / 1e6


def main() -> None:
    """Runs the four processes and prints the times of every operation, in ms."""
    context = mp.get_context("fork")
    pipes, processes = [], []
    for rank in range(4):
        here, there = context.Pipe()
        process = context.Process(target=_member, args=(rank, there), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(addresses)
    found: dict[str, list[float]] = {}
    waiting = len(pipes)
    while waiting:
        told = [pipe.recv() for pipe in pipes]
        for result in told:
            if isinstance(result, dict):
                waiting -= 1
                for name, times in result.items():
                    found.setdefault(name, []).extend(times)
        for pipe in pipes:
            pipe.send("go")
    for process in processes:
        process.join(_TIMEOUT_S)
    print(json.dumps(dict(sorted(found.items()))))


if __name__ == "__main__":
    main()
