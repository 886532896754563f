"""Communicators and layouts, between real processes: one a GPU, or gloo on a CPU.

A communicator of one member is what one GPU can show of NCCL (two members may not share a GPU):
what it costs to make one, what its first and next collective cost, and that giving it up leaves the
device usable.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from gpuworker.attention.xfuser_usp import chosen_attention
from gpuworker.collectives.channels import cuda_channel, host_channel
from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.rendezvous import Rendezvous
from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.measuring.record import Cell, MeasurementLog
from gpuworker.measuring.sizes import SIZES, TINY, MediaSize, built
from gpuworker.measuring.steps import compared, timed_us
from hocket.clock import steady_ns

_TIMEOUT_S = 60.0
_ANSWER_S = 600.0
_ELEMENTS = 1 << 20
_CPU_MEMBERS = 2


def measure_groups(record: MeasurementLog, kind: str, rounds: int) -> None:
    """Communicators of one member, then of every size that this machine has devices for."""
    cells: list[Cell] = [{"members": size} for size in (1, *_sizes(kind))]
    for cell in record.wanted(cells):
        members = int(cell["members"])
        try:
            if members == 1:
                record.add(cell, **_alone(_place(kind, 0), rounds))
            else:
                record.add(cell, **_together(members, _groups_of, (kind, rounds))[0])
        except Exception as error:  # a size that fails must not cost the others
            traceback.print_exc()
            record.add(cell, error=f"{type(error).__name__}: {error}"[:400])


def measure_layouts(record: MeasurementLog, model: str, kind: str, steps: int) -> None:
    """One step of the model's largest picture in every layout; nothing where there is one GPU."""
    cells: list[Cell] = [
        {"members": size, "cfg": 1, "ulysses": ulysses, "ring": size // ulysses, "attention": how}
        for size in _sizes(kind)
        for ulysses in (8, 4, 2, 1)
        if size % ulysses == 0
        for how in (("native", "xfuser") if kind == "cuda" else ("native",))
    ]
    for cell in record.wanted(cells):
        try:
            found = _together(int(cell["members"]), _layout_of, (kind, model, dict(cell), steps))
            record.add(cell, **found[0])
        except Exception as error:
            traceback.print_exc()
            record.add(cell, error=f"{type(error).__name__}: {error}"[:400])


def _sizes(kind: str) -> list[int]:
    most = torch.cuda.device_count() if kind == "cuda" else _CPU_MEMBERS
    return [size for size in (2, 4, 8) if size <= most]


def _place(kind: str, rank: int) -> torch.device:
    return torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")


def _alone(device: torch.device, rounds: int) -> dict[str, Any]:
    """Makes, uses and gives up communicators of one member, one after the other."""
    rendezvous, timeout = Rendezvous(), timedelta(seconds=_TIMEOUT_S)
    store = rendezvous.client(rendezvous.address)
    gloo = dist.ProcessGroupGloo.create_device(hostname=rendezvous.host)
    found: dict[str, list[int]] = {"form_us": [], "first_us": [], "next_us": [], "abort_us": []}
    tensor = torch.ones(_ELEMENTS, device=device)
    for number in range(rounds):
        name = PrefixStore(f"alone/{number}", store)
        began_ns = steady_ns()
        if device.type == "cuda":
            channel = cuda_channel(name, 0, 1, timeout, device)
        else:
            channel = host_channel(name, 0, 1, timeout, gloo)
        found["form_us"].append((steady_ns() - began_ns) // 1000)
        for key in ("first_us", "next_us"):
            found[key].append(_by_clock_us(device, partial(_reduced, channel, tensor)))
        began_ns = steady_ns()
        if device.type == "cuda":
            channel.abort()
        del channel
        found["abort_us"].append((steady_ns() - began_ns) // 1000)
    usable = bool((tensor + 1).isfinite().all())  # the device still computes
    rendezvous.close()
    return {**found, "usable_after": usable}


def _reduced(channel: Any, tensor: torch.Tensor) -> None:
    channel.allreduce([tensor]).wait()


def _by_clock_us(device: torch.device, work: Callable[[], Any]) -> int:
    began_ns = steady_ns()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (steady_ns() - began_ns) // 1000


# What members do, each in a process of its own.


def _groups_of(
    rank: int, names: tuple[str, ...], cache: GroupCache, address: str, *given: Any
) -> Any:
    kind, rounds = given
    device = _place(kind, rank)
    found: dict[str, list[int]] = {"cold_us": [], "warm_us": [], "exchange_us": [], "abort_us": []}
    flat = torch.ones(_ELEMENTS // len(names) * len(names), device=device)
    each = [len(flat) // len(names)] * len(names)
    for epoch in range(1, rounds + 1):
        began_ns = steady_ns()
        group = cache.get(epoch, names, address, _TIMEOUT_S)
        group.broadcast_word(1 if rank == 0 else None)
        found["cold_us"].append((steady_ns() - began_ns) // 1000)
        began_ns = steady_ns()
        cache.get(epoch, names, address, _TIMEOUT_S)
        found["warm_us"].append((steady_ns() - began_ns) // 1000)
        for _ in range(3):
            took_us = _by_clock_us(device, partial(group.all_to_all, flat, each, each))
        found["exchange_us"].append(took_us)
        group.broadcast_word(1 if rank == 0 else None)  # nobody gives up while others exchange
        began_ns = steady_ns()
        group.abort()
        found["abort_us"].append((steady_ns() - began_ns) // 1000)
    return found


def _layout_of(
    rank: int, names: tuple[str, ...], cache: GroupCache, address: str, *given: Any
) -> Any:
    kind, model, cell, steps = given
    device = _place(kind, rank)
    size = {**SIZES, **TINY}[model]
    card = built(size, device, torch.bfloat16 if kind == "cuda" else torch.float32)
    if cell["attention"] == "xfuser":
        attention = chosen_attention("xfuser", device)
        assert attention is not None
        card.attend_by(attention)
    shape: MediaSize = size.shapes[-1]
    state = card.encode("measured", "", *shape, steps, size.guidance, 0)
    expected = [state]
    for _ in range(2):
        expected = card.step(expected, None)
    group = cache.get(1, names, address, _TIMEOUT_S)
    group.timeout_s = _TIMEOUT_S
    team = Team(group, GroupLayout(cell["cfg"], cell["ulysses"], cell["ring"]))
    moved = card.step(card.step([state], team), team)
    alone_us = [timed_us(device, lambda: card.step([state], None)) for _ in range(steps)]
    ours_us = [timed_us(device, lambda: card.step([state], team)) for _ in range(steps)]
    group.broadcast_word(1 if rank == 0 else None)
    both = (moved[0].tensors["latents"], expected[0].tensors["latents"])
    return {"shape": str(shape), "ours_us": ours_us, "alone_us": alone_us, **compared(*both)}


def _together(members: int, task: Callable[..., Any], given: tuple[Any, ...]) -> list[Any]:
    """Runs `task` in so many processes that share a rendezvous; what each of them found."""
    context = mp.get_context("spawn")  # a CUDA context does not survive a fork
    names = tuple(f"m{rank}" for rank in range(members))
    pipes, processes = [], []
    try:
        for rank in range(members):
            here, there = context.Pipe()
            process = context.Process(
                target=_member, args=(rank, names, there, task, given), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        address = _told(pipes[0])
        for pipe in pipes:
            pipe.send(address)
        return [_told(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _told(pipe: Connection) -> Any:
    if not pipe.poll(_ANSWER_S):
        raise TimeoutError(f"a member says nothing for {_ANSWER_S:.0f} s")
    found = pipe.recv()
    if isinstance(found, Exception):
        raise found
    return found


def _member(
    rank: int,
    names: tuple[str, ...],
    pipe: Connection,
    task: Callable[..., Any],
    given: tuple[Any, ...],
) -> None:
    try:
        device = _place(given[0], rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        rendezvous = Rendezvous()
        cache = GroupCache(rendezvous, names[rank], device)
        if rank == 0:
            pipe.send(rendezvous.address)
        address = pipe.recv()
        pipe.send(task(rank, names, cache, address, *given))
        pipe.poll(None)  # the others may still need this one's store; ended by the parent
    except Exception as error:
        traceback.print_exc()
        pipe.send(RuntimeError(f"member {rank}: {type(error).__name__}: {error}"))
