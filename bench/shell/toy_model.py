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
CELLS = {
    (MODEL, node, side, side, 1, degree): call_us
    for node, side, degree, call_us in (
        ("text", 64, 1, _STAGE_US),
        ("dit", 64, 1, STEP_US),
        ("dit", 64, 2, STEP_US * 3 // 5),
        ("vae", 64, 1, _STAGE_US),
        ("dit", 32, 1, STEP_US // 2),  # of first passes
        ("dit", 32, 2, STEP_US // 2),
        ("vae", 32, 1, _STAGE_US // 2),
    )
}
PROFILE = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n" + "".join(
    f"{MODEL},{GPU},{node},{width},{height},1,{degree},1,{call_us},simulated\n"
    for (_, node, width, height, _, degree), call_us in CELLS.items()
)


def emulated_host(loop: SimulatedLoop) -> EmulatedHost:
    """A host whose workers take that time for a call."""
    return EmulatedHost(clock=SimulatedClock(loop), profile=CELLS)
