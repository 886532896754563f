"""What `hocket status` shows: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from hocket.launching.mesh_file import Process
from hocket.v1.control_pb2 import PoolStatus, WatchClusterResponse, WorkerStatus
from hocket.v1.generation_pb2 import ModelInfo
from hocket.v1.types_pb2 import Memory
from hocket.workflows.roles import ROLE_OPERATIONS, missing_roles


def status_view(
    state: WatchClusterResponse, processes: Sequence[Process]
) -> Iterator[RenderableType]:
    """Tables and lines, in the order in which they are read."""
    yield _workers(state.workers)
    yield from (line for worker in state.workers for line in _notes(worker))
    if state.replicas:
        yield _replicas(state)
    if processes:
        yield process_table(processes)
    if state.promises.with_deadline:
        yield _promises(state)
    if state.troubles:
        told = ", ".join(f"{name} {count}" for name, count in sorted(state.troubles.items()))
        yield f"troubles: {told}"
    if state.pools:
        yield _pools(state.pools)
    served = ", ".join(map(_named, state.models)) or "none"
    yield (
        f"policy {state.policy}, term {state.term}, {state.requests_open} requests open, "
        f"models: {served}"
    )


def process_table(processes: Sequence[Process]) -> Table:
    """The processes of this state folder's launcher."""
    table = _table("process", "pid", "restarts", "last end")
    for one in processes:
        pid = str(one.pid) if one.pid else "down"
        table.add_row(one.name, pid, str(one.restarts), one.ended or "-")
    return table


def _workers(workers: Sequence[WorkerStatus]) -> Table:
    table = _table("worker", "state", "roles", "beat", "MiB", "weights", "latents", "starts")
    for worker in workers:
        used, total = _mib(worker.memory_used_bytes), _mib(worker.memory_total_bytes)
        table.add_row(
            worker.name,
            worker.state,
            _roles(worker.memory),
            _ago(worker.heartbeat_age_us),
            f"{used:.0f}/{total:.0f}",
            _weights(worker.memory),
            _latents(worker.memory),
            str(worker.restarts + 1),
        )
    return table


def _notes(worker: WorkerStatus) -> Iterator[str]:
    """What is worth a line of its own about a worker."""
    if worker.note:
        yield f"{worker.name}: {worker.note}"
    if worker.slowdown > 1:
        yield f"{worker.name}: takes {worker.slowdown:.2f} times as long as its peers"
    if worker.latents_alone and worker.state == "draining":
        yield f"{worker.name}: holds {worker.latents_alone} latents that nobody else has"
    memory = worker.memory
    if memory.budget_bytes:
        yield (
            f"{worker.name}: memory budget {_mib(memory.budget_bytes):.0f} MiB, "
            f"{memory.evictions} evictions"
        )
    if memory.ahead_taken:
        yield (
            f"{worker.name}: {memory.ahead_taken} inputs came before their turn; "
            f"{_mib(memory.ahead_bytes):.1f} MiB are here"
        )
    if memory.prompts_recalled:
        texts = memory.prompts_recalled + memory.prompts_encoded
        yield (
            f"{worker.name}: {memory.prompts_recalled} of {texts} texts were encoded before; "
            f"embeddings {_mib(memory.prompts_bytes):.1f} MiB"
        )


def _replicas(state: WatchClusterResponse) -> Table:
    table = _table("control", "role", "heard of")
    for replica in state.replicas:
        table.add_row(replica.address, replica.role, f"{_ago(replica.age_us)} ago")
    return table


def _pools(pools: Sequence[PoolStatus]) -> Table:
    table = _table("pool", "gpu", "workers", "wanted", "why", "needed", "late")
    for pool in pools:
        table.add_row(
            pool.model or "all models",
            pool.gpu or "-",
            str(pool.workers),
            str(pool.wanted),
            pool.reason,
            f"{pool.needed:.2f}",
            f"{pool.late_share:.0%}",
        )
    return table


def _named(model: ModelInfo) -> str:
    if model.HasField("workers") and not model.workers:
        return f"{model.name} (no worker)"
    missing = missing_roles(model)
    return f"{model.name} (no {', '.join(missing)})" if missing else model.name


def _promises(state: WatchClusterResponse) -> str:
    figures = state.promises
    kept = f"{figures.kept / figures.promised:.1%}" if figures.promised else "-"
    return (
        f"told on time: {figures.promised}, of those kept: {figures.kept} ({kept}); "
        f"on time of all with a deadline: {figures.on_time} of {figures.with_deadline}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    return table


def _roles(memory: Memory) -> str:
    """Nodes of the chain that it has weights for, on the device or not."""
    nodes = {part.node for part in memory.parts}
    held = [role for role in ROLE_OPERATIONS if role in nodes]
    return "all" if len(held) == len(ROLE_OPERATIONS) else " ".join(held) or "-"


def _weights(memory: Memory) -> str:
    # A part is told for each node that needs it; a worker of an older version names none.
    parts = {part.part or (part.model, part.node): part.resident for part in memory.parts}
    return f"{_mib(memory.weights_bytes):.1f} ({sum(parts.values())}/{len(parts)})"


def _latents(memory: Memory) -> str:
    spilled = memory.latents_host_bytes + memory.latents_file_bytes
    told = f"{_mib(memory.latents_bytes):.1f}"
    return f"{told}+{_mib(spilled):.1f}" if spilled else told


def _mib(size_bytes: int) -> float:
    return size_bytes / 2**20


def _ago(age_us: int) -> str:
    return f"{age_us / 1e3:.0f} ms" if age_us < 10_000_000 else f"{age_us / 1e6:.0f} s"
