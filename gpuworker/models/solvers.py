"""Noise schedulers that go from worker to worker: taken anew for each step, their past put back.

What a multistep solver remembers between two steps is part of the job's `LatentState` ("solver.…"
among its tensors and facts), so that the next worker steps on as if it had made the last step. One
that draws noise keeps the state of its random generator there.

A job that begins from latents makes the last steps of a schedule alone: it has "first_step" among
its facts, the number of steps before its first one, and a solver without a past. Where a mask keeps
a part of them, that part is put back after each step, with the noise that the next step expects.

Setting the times of a scheduler copies tables to the device and waits for it, which on CUDA would
stop the stream between any two steps: `Schedules` does it once a kind of job, a step takes a copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor

from gpuworker.state import Fact, LatentState

_PREFIX = "solver."
FIRST_STEP = "first_step"  # fact of a state: steps of its schedule that it does not make
_KEPT, _KEPT_NOISE, _ANEW = "kept.latents", "kept.noise", "kept.anew"
_SCHEDULES_MAX = 64  # kinds of job whose times are kept: shapes x numbers of steps


@dataclass(frozen=True)
class _Past:
    """Attributes in which a scheduler keeps its past."""

    tensors: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()  # of tensors or None, the newest last
    numbers: tuple[str, ...] = ()


class _NoisyDPM(CogVideoXDPMScheduler):
    """CogVideoX's DPM-Solver with a past: the last step's outcome, and its random generator."""

    last_original: Tensor | None = None
    noise_state: Tensor | None = None
    _begun_at = 0

    def set_begin_index(self, index: int) -> None:
        """As of the schedulers that have one."""
        self._begun_at = index

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        """One step; the noise is drawn on the CPU, as the pipeline does with a generator there."""
        assert self.noise_state is not None, "noise_memory() gives the first one"
        generator = torch.Generator("cpu")
        generator.set_state(self.noise_state.cpu())
        moved, self.last_original = super().step(
            prediction,
            self.last_original,
            timestep,
            self.timesteps[self._begun_at - 1] if self._begun_at else None,
            latents,
            generator=generator,
            return_dict=return_dict,
        )
        self.noise_state = generator.get_state()
        return (moved,)


# Stock Wan and PixArt come with the multistep ones.
_KNOWN: Mapping[str, _Past] = {
    "FlowMatchEulerDiscreteScheduler": _Past(),
    "EulerDiscreteScheduler": _Past(),
    "DDIMScheduler": _Past(),
    "CogVideoXDDIMScheduler": _Past(),
    "CogVideoXDPMScheduler": _Past(tensors=("last_original", "noise_state")),
    "DPMSolverMultistepScheduler": _Past(lists=("model_outputs",), numbers=("lower_order_nums",)),
    "UniPCMultistepScheduler": _Past(
        tensors=("last_sample",),
        lists=("model_outputs", "timestep_list"),
        numbers=("lower_order_nums", "this_order"),
    ),
}


_OURS: Mapping[str, Any] = {"CogVideoXDPMScheduler": _NoisyDPM}  # in place of diffusers' own


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


def noise_memory(scheduler: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """For the first state of a job, where its noise scheduler will draw from `generator` too."""
    known = _KNOWN[type(scheduler).__name__].tensors
    return {_PREFIX + "noise_state": generator.get_state()} if "noise_state" in known else {}


def schedule_steps(state: LatentState) -> int:
    """Steps of the whole schedule of which `state` makes the last ones."""
    return state.steps_total + _first_step(state)


def kept(clean: Tensor, noise: Tensor, anew: Tensor) -> dict[str, Tensor]:
    """For the first state of a job: `clean` latents stay where `anew` is 0; all of one shape."""
    return {_KEPT: clean, _KEPT_NOISE: noise, _ANEW: anew.bool()}


class Schedules:
    """A model's noise scheduler with its times set, for the kinds of job that came last."""

    def __init__(self, prototype: Any) -> None:
        self._prototype = prototype
        self._known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def solver(self, state: LatentState, timing: Mapping[str, Any]) -> Solver:
        """For the next step of `state`; `timing` are the arguments of `set_timesteps`."""
        name = type(self._prototype).__name__
        kind = tuple(
            (key, value.tobytes() if isinstance(value, np.ndarray) else value)
            for key, value in sorted(timing.items())
        )
        if kind not in self._known:
            made = _OURS.get(name, type(self._prototype)).from_config(self._prototype.config)
            made.set_timesteps(**timing)
            self._known[kind] = made
            if len(self._known) > _SCHEDULES_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(kind)
        # What a step changes is set on the copy; the tables that both share are only read.
        return Solver(copy.copy(self._known[kind]), _KNOWN[name], state)


class Solver:
    """A scheduler that is about to make one step of one job."""

    def __init__(self, scheduler: Any, past: _Past, state: LatentState) -> None:
        self._scheduler, self._past = scheduler, past
        self._place = state.steps_done + _first_step(state)
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self._place)
        self._state = state
        self._recall()

    @property
    def timestep(self) -> Tensor:
        """Of the step to be made."""
        timestep: Tensor = self._scheduler.timesteps[self._place]
        return timestep

    def scaled(self, latents: Tensor) -> Tensor:
        """The model's input for these latents."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return latents
        scaled: Tensor = self._scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def noised(self, clean: Tensor, noise: Tensor, ahead: int = 0) -> Tensor:
        """Latents with the noise that the step to be made expects, or the one so many ahead."""
        add = getattr(self._scheduler, "scale_noise", None)
        timestep = self._scheduler.timesteps[self._place + ahead]
        if add is not None:
            return torch.as_tensor(add(clean, timestep[None], noise))
        return torch.as_tensor(self._scheduler.add_noise(clean, noise, timestep[None]))

    def step(self, prediction: Tensor) -> LatentState:
        """The state one step later, with what the solver will want to know of this one."""
        latents = self._state.tensors["latents"]
        (moved,) = self._scheduler.step(prediction, self.timestep, latents, return_dict=False)[:1]
        tensors, facts = self._remembered()
        return self._state.advanced(self._put_back(moved), tensors, facts)

    def _put_back(self, moved: Tensor) -> Tensor:
        tensors = self._state.tensors
        if _ANEW not in tensors:
            return moved
        clean, anew = tensors[_KEPT], tensors[_ANEW].to(moved.dtype)
        if self._state.steps_done + 1 < self._state.steps_total:
            # The scheduler stands at the next step already; the noise it adds is that one's.
            clean = self.noised(clean, tensors[_KEPT_NOISE], ahead=1)
        return (1 - anew) * clean + anew * moved

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


def _first_step(state: LatentState) -> int:
    first = state.facts.get(FIRST_STEP, 0)
    assert isinstance(first, int), first
    return first
