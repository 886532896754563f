"""Plans do not depend on how this process hashes: other processes come to the same digests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import hashlib
import sys

import msgspec

from bench.sim.case import FaultSpec
from bench.sim.costs import Costs
from bench.sim.loop import run
from control.scheduler.planning import stages
from control.scheduler.policies import registry
from tests.scheduler.driving import case

if "--by-hash" in sys.argv:
    real = stages.waiting
    stages.waiting = lambda ledger: sorted(real(ledger), key=lambda pair: hash(pair[0].id))

PX, SLO_US = (256, 512, 1024, 2048), (900_000, 3_000_000)
ROWS = [(i // 4 * 280_000, PX[i % 4], SLO_US[i % 2]) for i in range(12)]
FAULTS = (
    FaultSpec(at_us=600_000, kind="lost", worker="w0001"),
    FaultSpec(at_us=900_000, kind="up", worker="w0009"),
    FaultSpec(at_us=950_000, kind="cancel", request="r5"),
)
for policy in registry.names():
    one = case(ROWS, faults=FAULTS, policy=policy)
    one = msgspec.structs.replace(one, costs=Costs(noise=0.1, group_change_us=3_000))
    result = run(one)
    text = "".join(result.digests) + result.log.text()
    print(policy, len(result.plans), hashlib.sha256(text.encode()).hexdigest())
"""


def told(hash_seed, *arguments):
    """What the script prints in a process with this hash seed."""
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.splitlines()


def test_every_policy_plans_alike_whatever_the_hash_seed():
    first, *others = (told(seed) for seed in (0, 1, 4242))
    assert len(first) >= 19 and all(other == first for other in others)


def test_an_order_by_hash_would_be_seen():
    assert told(0, "--by-hash") != told(1, "--by-hash")
