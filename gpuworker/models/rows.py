"""The rows of a forward: whose they are, and what of their states the transformer is given.

Here is also how noise is drawn: on the CPU in float32, so that it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpuworker.state import LatentState

PROMPTED, PLAIN = 0, 1  # branches of guidance; also the halves of a group that share them


class Row(NamedTuple):
    """One row of a forward: a job, and the branch of its guidance."""

    state: LatentState
    branch: int  # PROMPTED or PLAIN
    latents: Tensor  # [1, …], as the model wants them
    timestep: Tensor  # []


def stacked(rows: Sequence[Row], prompted: str, plain: str = "") -> Tensor:
    """A tensor of each row's state, one below the other; `plain` names that of the plain branch."""
    names = (prompted, plain or prompted)
    return torch.cat([row.state.tensors[names[row.branch]] for row in rows])


def latents_of(rows: Sequence[Row]) -> Tensor:
    """[rows, …]."""
    return torch.cat([row.latents for row in rows])


def timesteps_of(rows: Sequence[Row]) -> Tensor:
    """[rows]."""
    return torch.stack([row.timestep for row in rows])


def numbers_of(rows: Sequence[Row], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows]: a numeric fact of each row's state, filled in on the device without a copy to it."""
    device = rows[0].latents.device
    filled = [torch.full((1,), number(row.state, name), dtype=dtype, device=device) for row in rows]
    return torch.cat(filled)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 noise on the CPU; a seed gives the same numbers everywhere."""
    return drawn(shape, seeded(seed))


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The generator's next standard normal numbers, float32, on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def number(state: LatentState, name: str) -> float:
    """A numeric fact of a state."""
    value = state.facts[name]
    assert isinstance(value, int | float), (name, value)
    return value


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)


def skip(generator: torch.Generator, numbers: int) -> None:
    """Draws what somebody else has drawn from such a generator before."""
    if numbers:
        torch.randn(numbers, generator=generator)
