"""One Case through the *live* mesh in real time: real broker, services, workers and gRPC calls.

The counterpart of `bench.sim.loop.run`, which runs the same Case in simulated time; how near the
two come is what `python -m bench live` tells. (`manual_run.py` is the third way: the live driver on
a manual clock, whose plans must be equal to the simulator's.)
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.sim.case import Case
from bench.sim.trace import TraceRequest
from hocket.client import HocketClient
from hocket.clock import steady_ns
from hocket.errors import HocketError, MeshStopped
from hocket.launching.launcher import MeshPlan, mesh
from hocket.v1.generation_pb2 import Accepted, Finished, GenerateRequest
from hocket.v1.types_pb2 import GenerationSpec, Shape, Slo

_CONFIG_VARIABLE = "HOCKET_CONFIG"
_CALL_S = 1800.0
_BEGIN_S = 0.5  # from the warm-up's end to the trace's start
# Settings of control that a Case has, too; its own defaults differ from the library's.
_SETTINGS = ("rounds", "amend", "round_us", "lead_us", "stages_ahead")


@dataclass(frozen=True)
class RequestOutcome:
    """How a request went; times in microseconds."""

    latency_us: int | None  # from acceptance to the end; None: it was refused or failed
    on_time: bool
    predicted_us: int = 0
    name: str = ""  # by which traces know it
    problem: str = ""


async def run_live(
    case: Case, folder: Path, executor: str, told: Callable[[int, int], None]
) -> dict[str, RequestOutcome]:
    """Starts a mesh in `folder`, sends the Case's requests at their times; outcomes by request.

    `told(ended, all)` is called as requests end. Raises: MeshStopped, HocketError.
    """
    profile, config = _files(case, folder)
    plan = MeshPlan(
        state_dir=folder,
        workers=case.cluster.workers * case.cluster.hosts,
        policy=case.settings.policy,
        executor=executor,
        profile=str(profile) if executor == "emulated" else "",
        log_level="warning",
    )
    with _configured(config):
        async with mesh(plan, _quiet) as running, HocketClient(running.gateway) as client:
            prompts = {m.name: list(m.examples) for m in await client.models(wait_for_ready=True)}
            await _warm(case, client, prompts)
            return await _send(case, client, prompts, told)


def _files(case: Case, folder: Path) -> tuple[Path, Path]:
    """Writes the Case's profile, and its settings as services read them."""
    folder.mkdir(parents=True, exist_ok=True)
    profile, config = folder / "profile.csv", folder / "case.toml"
    profile.write_text(case.profile_csv)
    config.write_text(_config(case, profile))
    return profile, config


async def _warm(case: Case, client: HocketClient, prompts: Mapping[str, list[str]]) -> None:
    """Runs one request of each kind, a few steps: first calls of a process are slow ones."""
    kinds = {(t.model, t.width, t.height, t.frames): t for t in case.trace}
    for item in kinds.values():
        short = msgspec.structs.replace(item, steps=min(4, item.steps))
        await asyncio.gather(
            *(
                client.generate_media(_wanted(short, number, prompts, deadline=False))
                for number in range(case.cluster.workers * case.cluster.hosts)
            )
        )


async def _send(
    case: Case,
    client: HocketClient,
    prompts: Mapping[str, list[str]],
    told: Callable[[int, int], None],
) -> dict[str, RequestOutcome]:
    begin_ns = steady_ns() + round(_BEGIN_S * 1e9)
    ended: dict[str, RequestOutcome] = {}

    async def one(number: int, item: TraceRequest) -> None:
        await asyncio.sleep((begin_ns - steady_ns()) / 1e9 + item.arrival_us / 1e6)
        ended[item.id] = await _outcome(client, _wanted(item, number, prompts))
        told(len(ended), len(case.trace))

    async with asyncio.TaskGroup() as tasks:
        for number, item in enumerate(case.trace):
            tasks.create_task(one(number, item))
    return ended


async def _outcome(client: HocketClient, wanted: GenerateRequest) -> RequestOutcome:
    name = ""
    try:
        async for event in client.generate(wanted, timeout_s=_CALL_S):
            if isinstance(event, Accepted):
                name = event.request_id
            elif isinstance(event, Finished):
                predicted_us = event.predicted_latency_us
                return RequestOutcome(event.latency_us, event.on_time, predicted_us, name)
    except HocketError as error:
        return RequestOutcome(None, False, name=name, problem=str(error))
    raise MeshStopped(f"the stream of {name} ended without a word")


def _wanted(
    item: TraceRequest, number: int, prompts: Mapping[str, list[str]], *, deadline: bool = True
) -> GenerateRequest:
    known = prompts.get(item.model) or ["a fox"]
    return GenerateRequest(
        spec=GenerationSpec(
            model=item.model,
            prompt=known[number % len(known)],
            shape=Shape(width=item.width, height=item.height, frames=item.frames),
            steps=item.steps,
            seed=number,
        ),
        slo=Slo(deadline_us=item.slo_us if deadline else 0),
        priority=item.priority,
    )


def _config(case: Case, profile: Path) -> str:
    """The Case's settings as services read them; a JSON string is a TOML one, too."""
    own = {name: getattr(case.settings, name) for name in _SETTINGS}
    own["profiles"] = [str(profile)]
    own["policy_settings"] = [
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in case.settings.policy_settings.items()
    ]
    lines = ["[control]", *(f"{key} = {json.dumps(value)}" for key, value in own.items())]
    lines += ["[gpuworker]", f"gpu = {json.dumps(case.cluster.gpu)}"]
    return "\n".join(lines) + "\n"


@contextmanager
def _configured(config: Path) -> Iterator[None]:
    """Children read this file, and nothing else that was configured outside."""
    before = os.environ.get(_CONFIG_VARIABLE)
    os.environ[_CONFIG_VARIABLE] = str(config)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CONFIG_VARIABLE]
        else:
            os.environ[_CONFIG_VARIABLE] = before


def _quiet(_: str) -> None:
    """The command prints its own progress."""
