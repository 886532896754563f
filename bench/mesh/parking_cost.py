"""`python -m bench memory`: what a parked job takes, and what coming and going costs.

Measured, in a process of its own (gpuworker/measuring/parked.py): the embedded model's states,
spilling one and getting it back, weights that are loaded and evicted. By arithmetic: the states of
models that are too large to be run here, from the shapes that their cards make; a test holds the
same formulas against small models of the same families.
"""

from __future__ import annotations

import asyncio
import json
import sys

from bench.mesh.request_cost import MeshFindings

_FLUX_SIDES_PX = (512, 1024, 2048)
_WAN_SHAPES = ((832, 480, 81), (1280, 720, 81))
_MIB = 1 << 20


async def measure(rounds: int) -> MeshFindings:
    """Every figure, with `rounds` repetitions of what is timed."""
    command = (sys.executable, "-m", "gpuworker.measuring.parked", str(rounds))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    found = MeshFindings()
    for unit, figures in json.loads(out).items():
        for name, values in figures.items():
            found.add(name, unit, values)
    for side in _FLUX_SIDES_PX:
        size = flux_state_bytes(side, side)
        found.add(f"parked job, FLUX.1-dev {side} px, arithmetic", "MiB", [size / _MIB])
    for width, height, frames in _WAN_SHAPES:
        for solver, history in (("Euler", 0), ("UniPC", 3)):
            size = wan_state_bytes(width, height, frames, history)
            name = f"parked job, Wan 2.1 {width}x{height}x{frames}, {solver}, arithmetic"
            found.add(name, "MiB", [size / _MIB])
    return found


def flux_state_bytes(
    width: int,
    height: int,
    *,
    pixels_a_token: int = 16,
    channels: int = 64,
    text_tokens: int = 512,
    text_width: int = 4096,
    pooled_width: int = 768,
    element_bytes: int = 2,
) -> int:
    """Latents and position ids of each token, embeddings of the text, the pooled one."""
    tokens = (width // pixels_a_token) * (height // pixels_a_token)
    elements = tokens * (channels + 3) + text_tokens * (text_width + 3) + pooled_width
    return elements * element_bytes


def wan_state_bytes(
    width: int,
    height: int,
    frames: int,
    history: int,
    *,
    channels: int = 16,
    text_tokens: int = 512,
    text_width: int = 4096,
    element_bytes: int = 2,
) -> int:
    """Latents in float32, as many again for each of the solver's `history`; two embeddings."""
    latents = channels * ((frames - 1) // 4 + 1) * (height // 8) * (width // 8)
    texts = 2 * text_tokens * text_width * element_bytes
    stamps = 8 * max(0, history - 1)  # of the solver's last outputs, one int64 each
    return latents * 4 * (1 + history) + texts + stamps
