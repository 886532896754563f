"""What a mesh holds before the load and after it: memory, files, connections, streams, latents."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bench.admission.tree import rss_kib
from bench.chaos.strikes import Strikes, cluster_state
from hocket.launching import endpoints

_ANSWER_S = 5.0
# How much more there may be after the load than before it, by the last word of a figure's name.
GROWTH_MAX = {
    "MiB": 192.0,
    "files": 96.0,
    "connections": 0.0,
    "subscriptions": 8.0,
    "streams": 0.0,
    "consumers": 2.0,
    "open": 0.0,
}


async def look(strikes: Strikes, monitors: list[str]) -> dict[str, float]:
    """Figures by name. `monitors` are the brokers' HTTP doors."""
    found: dict[str, float] = {}
    processes = {child.name: child.process.pid for child in strikes.mesh.children.all}
    processes |= {one.name: one.pid for one in strikes.worker_processes()}
    for name, pid in processes.items():
        found[f"{name} MiB"] = round(rss_kib(pid) / 1024, 1)
        found[f"{name} files"] = _files(pid)  # sockets of groups among them
    for door in monitors:
        for name, value in (await asyncio.to_thread(_broker, door)).items():
            found[name] = found.get(name, 0.0) + value
    return found


async def quiet(state_dir: Path, limit_s: float) -> dict[str, float]:
    """Requests and latents that the leader still knows of, once they are gone or time is up."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limit_s
    told: dict[str, float] = {"requests open": 1.0}
    while loop.time() < end_s:
        for door in endpoints.living(state_dir, "control"):
            state = await cluster_state(door.address)
            if state is None:
                continue
            held = sum(
                w.memory.latents_bytes + w.memory.latents_host_bytes + w.memory.latents_file_bytes
                for w in state.workers
            )
            told = {"requests open": float(state.requests_open), "latent bytes": float(held)}
            if not any(told.values()):
                return told
        await asyncio.sleep(0.5)
    return told


def growth_max(names: dict[str, float]) -> dict[str, float]:
    """What each figure may grow by."""
    return {name: GROWTH_MAX.get(name.split()[-1], 0.0) for name in names}


def _files(pid: int) -> float:
    try:
        return float(len(os.listdir(f"/proc/{pid}/fd")))
    except (FileNotFoundError, PermissionError):
        return 0.0


def _broker(door: str) -> dict[str, float]:
    try:
        facts, stores = _get(f"{door}/varz"), _get(f"{door}/jsz")
    except (urllib.error.URLError, OSError):
        return {}
    return {
        "broker subscriptions": float(facts["subscriptions"]),
        "broker connections": float(facts["connections"]),
        "broker streams": float(stores["streams"]),
        "broker consumers": float(stores["consumers"]),
    }


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def listening(addresses: list[str]) -> list[str]:
    """Doors at which somebody still listens. Call it from a thread."""
    found = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, int(port))) == 0:
                found.append(address)
    return found
