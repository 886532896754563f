"""Puts a torch worker's process together: device, models, executor, agent."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from pathlib import Path

import msgspec
import torch

from gpuworker.agent import Agent
from gpuworker.attention.xfuser_usp import XfuserMissing, chosen_attention
from gpuworker.config import EMBEDDED_MODELS, WorkerSettings
from gpuworker.folders.identity import FileDigests
from gpuworker.loading import LoadError, distinct_bytes
from gpuworker.memory.latents import Shares
from gpuworker.memory.weights import BudgetTooSmall, WeightStore
from gpuworker.mesh.claim import claimed
from gpuworker.mesh.ending import ended_with
from gpuworker.mesh.naming import advertised_address, worker_name
from gpuworker.mesh.stopping import StopSignals, run_until
from gpuworker.operations.names import ROLES
from gpuworker.pool import run_pool
from gpuworker.steps.prefetch import Ahead
from gpuworker.torch_executor import TorchExecutor, load_cards, pick_device
from hocket.clock import SystemClock
from hocket.errors import WrongConfig
from hocket.launching import endpoints
from hocket.messaging.bus import Bus, Subjects
from hocket.security.identity import Identity, broker_access
from hocket.tracing import telemetry

_RESERVED = 0.15  # of a CUDA device: activations of what fits whole, the context, fragmentation
_PROMPTS_SHARE = 0.25  # of the latents' share, at most
_THREAD_SWITCH_S = 0.0005  # heartbeats and reports must not wait long for the compute thread's GIL


def run(settings: WorkerSettings) -> int:
    """Runs `settings.count` workers; returns the process's exit status."""
    if not settings.model:
        settings = msgspec.structs.replace(settings, model=tuple(map(str, EMBEDDED_MODELS)))
    set_native_environment()
    if settings.count == 1:
        return run_one(settings, settings.first_index)
    one = functools.partial(run_one, settings)
    return run_pool(settings.count, settings.first_index, one, settings.restarts_max)


def run_one(settings: WorkerSettings, index: int, restarts: int = 0) -> int:
    """Runs one worker until SIGTERM or SIGINT; `restarts`: how often it was started again."""
    sys.setswitchinterval(_THREAD_SWITCH_S)
    return ended_with(
        worker_name(settings, index),
        lambda: asyncio.run(_serve(settings, index, restarts)),
        wrong=(LoadError, BudgetTooSmall, XfuserMissing),
    )


async def _serve(settings: WorkerSettings, index: int, restarts: int) -> None:
    name = worker_name(settings, index)
    signals = StopSignals()
    signals.listen()
    told = telemetry.setup("gpuworker", name, settings.state_dir, settings.log_level)
    try:
        with claimed(settings.state_dir / "latents", name) as folder:
            bus, executor = await _made(settings, index, name, folder)
            agent = Agent(name, settings, bus, executor, SystemClock(), told.tracer, restarts)
            endpoints.announce(settings.state_dir, name, executor.store_address)
            try:
                await run_until([agent], signals)
            finally:
                endpoints.withdraw(settings.state_dir, name)
                await executor.close(signals.patience_s)
                await bus.close()
    finally:
        told.close()


async def _made(
    settings: WorkerSettings, index: int, name: str, folder: Path
) -> tuple[Bus, TorchExecutor]:
    """The models, on their device, and the connection; latents are spilled into `folder`."""
    device = pick_device(settings.device, index)
    alone = device.type == "cuda" and settings.count > torch.cuda.device_count()
    wanted = "native" if alone and settings.attention == "auto" else settings.attention
    digests = FileDigests(settings.state_dir / "file-digests.json")
    shares, weights_bytes = budgets(settings, device, folder, digests)
    weights = WeightStore(device, weights_bytes)
    cards = load_cards(
        settings.model,
        device,
        weights,
        compiled=settings.compile != "off",
        attention=chosen_attention(wanted, device),
        digests=digests,
        roles=settings.role or ROLES,
    )
    identity = Identity.load(settings.tls_dir)
    access = broker_access(identity, "worker")
    bus = await Bus.connect(settings.nats_url, name, access=access)
    executor = TorchExecutor(
        name,
        cards,
        device,
        settings.gpu or gpu_name(device.type, device.index or 0),
        bus,
        Subjects(settings.cluster),
        weights=weights,
        shares=shares,
        advertise=advertised_address(settings),
        groups_max=settings.groups_max,
        batch_max=settings.batch_max,
        alone=alone,
        identity=identity,
        ahead=Ahead(settings.ahead, settings.ahead_mib << 20),
    )
    return bus, executor


def budgets(
    settings: WorkerSettings, device: torch.device, folder: Path, digests: FileDigests
) -> tuple[Shares, int]:
    """Where latents may be parked, and the bytes that weights and activations may take.

    Raises WrongConfig and LoadError.
    """
    budget_bytes = settings.memory_mib << 20
    if not budget_bytes and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        room = int(total * (1 - _RESERVED))
        if distinct_bytes(settings.model, digests, settings.role or ROLES) > room:
            budget_bytes = room
    latents_bytes = (settings.latents_mib << 20) or budget_bytes // 4
    if budget_bytes and latents_bytes >= budget_bytes:
        allowed = f"less than memory_mib, which is {budget_bytes >> 20}"
        raise WrongConfig(key="latents_mib", value=str(settings.latents_mib), allowed=allowed)
    host_bytes = settings.latents_host_mib << 20 if device.type == "cuda" else 0
    weights_bytes = budget_bytes - latents_bytes if budget_bytes else 0
    prompts_bytes = settings.prompts_mib << 20
    if latents_bytes:
        prompts_bytes = min(prompts_bytes, int(latents_bytes * _PROMPTS_SHARE))
    return Shares(latents_bytes, host_bytes, folder, prompts_bytes), weights_bytes


def gpu_name(kind: str, index: int) -> str:
    """What profiles call a device where no name was given."""
    if kind == "cpu":
        return "cpu"
    name: str = torch.cuda.get_device_name(index)
    words = name.lower().split()  # "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"
    return next((word for word in words if any(c.isdigit() for c in word)), words[0])


def set_native_environment() -> None:
    """Native libraries read it when they start: it has to stand before CUDA, NCCL, OpenMP."""
    for key, value in {
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": "60",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(key, value)
