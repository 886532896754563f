"""What a plan costs: a cluster that is kept at so many open requests while plans are timed."""

from __future__ import annotations

from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import Arrived

from .arrivals import stream
from .case import ASSETS, Case, ClusterSpec
from .loop import Loop, Result, Timer
from .trace import TraceRequest
from .workload_base import alone_us, request
from .workloads import FLUX_PX, FLUX_STEPS

PROFILE = "flux.1-dev_h100_h28.csv"
WORKERS_A_HOST = 8
ENCODE_US = 30_000  # of the profile


def measure_plans(
    gpus: int, requests: int, plans: int, settings: Settings, seed: int, timer: Timer
) -> Result:
    """Times so many plans, with steps ending and a newcomer for each request that ends.

    Counting begins when there was time to encode all that came at the start.

    Shapes are FLUX.1-dev's four, evenly; deadlines spread evenly over the time in which the
    cluster works everything off at degree 1, so that some are hopeless, some easy. Hosts have
    eight workers, or one if eight do not divide `gpus`.
    """
    alone = alone_us(PROFILE, {"flux.1-dev": FLUX_STEPS["h28"]})
    drain_s = requests * sum(alone.values()) / len(alone) / gpus / 1e6
    rng = stream("solver", seed, "requests")
    made = 0

    def newcomer(at_us: int) -> TraceRequest:
        nonlocal made
        made += 1
        slo_s = 1.0 + drain_s * rng.uniform(0.0, 1.0)
        px = rng.choice(FLUX_PX)
        steps = FLUX_STEPS["h28"]
        return request(made, at_us / 1e6, "flux.1-dev", "txt2img", px, 1, steps, slo_s)

    profile_csv = (ASSETS / "profiles" / PROFILE).read_text()
    a_host = WORKERS_A_HOST if gpus % WORKERS_A_HOST == 0 else 1
    case = Case(
        cluster=ClusterSpec(workers=a_host, hosts=gpus // a_host).completed(
            Profile.from_csv(profile_csv)
        ),
        profile_csv=profile_csv,
        trace=tuple(newcomer(0) for _ in range(requests)),
        settings=settings,
    )
    loop = Loop(case, timer=timer, check=False, keep=False)
    inside, warm_us = requests, 2 * requests * ENCODE_US // gpus
    while len(loop.result.plan_ms) < plans and loop.instant():
        if loop.now_us < warm_us:
            loop.result.plan_ms.clear()
            loop.result.operations.clear()
        ended = len(loop.result.ended)
        while inside - ended < requests:
            inside += 1
            at_us = loop.now_us + 1
            loop.add(Arrived(at_us=at_us, request=newcomer(at_us).to_request()))
    return loop.result
