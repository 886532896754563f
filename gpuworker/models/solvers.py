"""Noise schedulers that go from worker to worker: built anew for each step, their past put back.

What a multistep solver remembers between two steps is part of the job's `LatentState` ("solver.…"
among its tensors and facts), so that the next worker steps on as if it had made the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpuworker.state import Fact, LatentState

_PREFIX = "solver."


@dataclass(frozen=True)
class _Past:
    """Attributes in which a scheduler keeps its past."""

    tensors: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()  # of tensors or None, the newest last
    numbers: tuple[str, ...] = ()


# Stock Wan and PixArt come with the multistep ones.
_KNOWN: Mapping[str, _Past] = {
    "FlowMatchEulerDiscreteScheduler": _Past(),
    "EulerDiscreteScheduler": _Past(),
    "DDIMScheduler": _Past(),
    "CogVideoXDDIMScheduler": _Past(),
    "DPMSolverMultistepScheduler": _Past(lists=("model_outputs",), numbers=("lower_order_nums",)),
    "UniPCMultistepScheduler": _Past(
        tensors=("last_sample",),
        lists=("model_outputs", "timestep_list"),
        numbers=("lower_order_nums", "this_order"),
    ),
}


class SolverRefused(Exception):
    """A noise scheduler whose past cannot travel. Fields: `found`, `allowed`."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"noise scheduler {found}; allowed: {allowed}")
        self.found, self.allowed = found, allowed


def check_solver(scheduler: Any) -> None:
    """Raises `SolverRefused` where its steps depend on more than we know how to carry."""
    name = type(scheduler).__name__
    if name not in _KNOWN:
        raise SolverRefused(name, ", ".join(_KNOWN))
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    if algorithm.startswith("sde"):
        raise SolverRefused(f"{name} with {algorithm}", "algorithms that draw no noise")
    if scheduler.config.get("stochastic_sampling"):
        raise SolverRefused(f"{name} with stochastic_sampling", "sampling that draws no noise")


def dynamic_shift(tokens: int, config: Any) -> float:
    """`mu` of the flow pipelines (calculate_shift): linear in the number of image tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    return float(tokens * slope + base - slope * low)


class Solver:
    """A scheduler that is about to make one step of one job."""

    def __init__(self, prototype: Any, state: LatentState, timing: Mapping[str, Any]) -> None:
        """`timing` are the arguments of its `set_timesteps`."""
        self._scheduler: Any = type(prototype).from_config(prototype.config)
        self._scheduler.set_timesteps(**timing)
        self._past = _KNOWN[type(prototype).__name__]
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(state.steps_done)
        self._state = state
        self._recall()

    @property
    def timestep(self) -> Tensor:
        """Of the step to be made."""
        timestep: Tensor = self._scheduler.timesteps[self._state.steps_done]
        return timestep

    def scaled(self, latents: Tensor) -> Tensor:
        """The model's input for these latents."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return latents
        scaled: Tensor = self._scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def step(self, prediction: Tensor) -> LatentState:
        """The state one step later, with what the solver will want to know of this one."""
        latents = self._state.tensors["latents"]
        (moved,) = self._scheduler.step(prediction, self.timestep, latents, return_dict=False)[:1]
        tensors, facts = self._remembered()
        return self._state.advanced(moved, tensors, facts)

    def _recall(self) -> None:
        tensors, facts = self._state.tensors, self._state.facts
        for name in self._past.tensors:
            setattr(self._scheduler, name, tensors.get(_PREFIX + name))
        for name in self._past.lists:
            places = range(len(getattr(self._scheduler, name)))
            found = [tensors.get(f"{_PREFIX}{name}.{place}") for place in places]
            setattr(self._scheduler, name, found)
        for name in self._past.numbers:
            if _PREFIX + name in facts:
                setattr(self._scheduler, name, facts[_PREFIX + name])

    def _remembered(self) -> tuple[dict[str, Tensor], dict[str, Fact]]:
        tensors: dict[str, Tensor] = {}
        for name in self._past.tensors:
            tensors[_PREFIX + name] = getattr(self._scheduler, name)
        for name in self._past.lists:
            for place, kept in enumerate(getattr(self._scheduler, name)):
                if kept is not None:
                    tensors[f"{_PREFIX}{name}.{place}"] = torch.as_tensor(kept)
        facts: dict[str, Fact] = {
            _PREFIX + name: int(getattr(self._scheduler, name)) for name in self._past.numbers
        }
        return tensors, facts
