"""The model that the simulated workers serve, and what its calls take on a host of theirs."""

from __future__ import annotations

from gpuworker.emulation.executor import EmulatedHost

from .loop import SimulatedLoop
from .waits import SimulatedClock

CLUSTER = "sim"
GPU = "toy-gpu"
MODEL = "toy"
STEP_US = 50_000
_STAGE_US = 20_000
PROFILE = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n" + "".join(
    f"{MODEL},{GPU},{node},64,64,1,{degree},1,{call_us},simulated\n"
    for node, degree, call_us in (
        ("text", 1, _STAGE_US),
        ("dit", 1, STEP_US),
        ("dit", 2, STEP_US * 3 // 5),
        ("vae", 1, _STAGE_US),
    )
)
CELLS = {
    (MODEL, "text", 64, 64, 1, 1): _STAGE_US,
    (MODEL, "dit", 64, 64, 1, 1): STEP_US,
    (MODEL, "dit", 64, 64, 1, 2): STEP_US * 3 // 5,
    (MODEL, "vae", 64, 64, 1, 1): _STAGE_US,
}


def emulated_host(loop: SimulatedLoop) -> EmulatedHost:
    """A host whose workers take that time for a call."""
    return EmulatedHost(clock=SimulatedClock(loop), profile=CELLS)
