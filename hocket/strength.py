"""How many steps a denoise node makes of latents that are there already, by its strength.

Control plans so many steps, and a worker makes them: one rule for both, that of diffusers' flow
pipelines (`get_timesteps` of FluxImg2ImgPipeline and its kin), with one step at least.
"""

from __future__ import annotations


def steps_to_run(steps: int, strength: float) -> int:
    """Of a schedule of `steps`, the last so many; `strength` is 0..1, and 1 means all of them.

    A share of a step is a whole one: 10 steps of strength 0.35 are 4.
    """
    behind = int(max(steps - min(steps * strength, steps), 0))
    return max(steps - behind, 1)
