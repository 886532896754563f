"""Live and simulated agree: one Case gives the same plan digests through the live driver (real
broker, manual clock, emulated workers) and through the simulator. With planted negatives.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from bench.live.manual_run import ManualRun
from bench.sim.case import Case, ClusterSpec
from bench.sim.loop import run
from bench.sim.trace import TraceRequest
from control.scheduler.settings import Settings
from control.scheduler.values import ModelFacts

PROFILE = Path(__file__).parents[2] / "control/assets/profiles/flux.1-dev_h100_h28.csv"
SHAPES = (256, 512, 1024, 2048)
_clusters = itertools.count()


def case(seed: int, policy: str, **settings: object) -> Case:
    """A dozen requests; arrivals, shapes and deadlines follow from the seed."""
    trace, at_us = [], 0
    for i in range(12):
        at_us += (seed * 7919 + i * 104_729) % 900_000
        side = SHAPES[(seed + i * i) % 4]
        trace.append(
            TraceRequest(
                id=f"r{i:03d}",
                arrival_us=at_us,
                model="flux.1-dev",
                workflow="txt2img",
                width=side,
                height=side,
                frames=1,
                steps=10 + (seed + i) % 9,
                slo_us=1_500_000 + 1000 * side,
                priority=0,
            )
        )
    return Case(
        cluster=ClusterSpec(
            workers=8, gpu="h100", models=(ModelFacts(name="flux.1-dev", degrees=(1, 2, 4, 8)),)
        ),
        profile_csv=PROFILE.read_text(),
        trace=tuple(trace),
        settings=Settings(policy=policy, lead_us=20_000, **settings),
    )


async def live(planned: Case, url: str, state: Path) -> list[str]:
    return await ManualRun(planned, f"manual-{next(_clusters)}", url, state).run()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["tetriserve", "fixed-1", "hocket"])
async def test_same_case_same_digests(
    seed: int, policy: str, nats_url: str, tmp_path: Path
) -> None:
    planned = case(seed, policy)
    assert await live(planned, nats_url, tmp_path) == list(run(planned).digests)


SUBLINEAR = {1: 100_000, 2: 110_000, 4: 120_000, 8: 150_000}  # a step of so many together
CELLS = {"text": {1: 5_000}, "dit": SUBLINEAR, "vae": {1: 5_000}}


@pytest.mark.parametrize("policy", ["hocket", "genserve"])
async def test_batches_agree(policy: str, nats_url: str, tmp_path: Path) -> None:
    """Equal pictures that come faster than one by one could be served."""
    rows = [
        f"flux.1-dev,h100,{node},512,512,1,1,{batch},{us},[T]"
        for node, cells in CELLS.items()
        for batch, us in cells.items()
    ]
    planned = case(2, policy)
    planned = msgspec.structs.replace(
        planned,
        profile_csv="\n".join((PROFILE.read_text().splitlines()[0], *rows)) + "\n",
        cluster=ClusterSpec(
            workers=2, gpu="h100", models=(ModelFacts(name="flux.1-dev", batch_max=4),)
        ),
        trace=tuple(
            msgspec.structs.replace(
                r, arrival_us=i * 60_000, width=512, height=512, steps=6, slo_us=1_500_000
            )
            for i, r in enumerate(planned.trace)
        ),
    )
    simulated = run(planned)
    assert any(len(a.batch) > 1 for p in simulated.plans for a in p.assignments)
    assert await live(planned, nats_url, tmp_path) == list(simulated.digests)


async def test_published_rounds_without_amendments_agree(nats_url: str, tmp_path: Path) -> None:
    planned = case(5, "tetriserve", amend=False)
    assert await live(planned, nats_url, tmp_path) == list(run(planned).digests)


async def test_comparison_sees_one_microsecond(nats_url: str, tmp_path: Path) -> None:
    """The planted negative: one arrival a microsecond later, and the digests part."""
    planned = case(1, "tetriserve")
    moved = msgspec.structs.replace(planned.trace[3], arrival_us=planned.trace[3].arrival_us + 1)
    other = msgspec.structs.replace(planned, trace=(*planned.trace[:3], moved, *planned.trace[4:]))
    assert await live(planned, nats_url, tmp_path) != list(run(other).digests)
