"""What a model family has to say: facts for everybody, and encode / step / decode for a worker.

A card owns weights and nothing of any request. All that a request needs between two steps is in its
`LatentState`, so that any worker which holds the state and the weights can make the next step.
Noise schedulers are built anew from their config for each step and set to the state's position:
nothing of one request can leak into another, and a joining worker agrees by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.elastic import Communicator
from gpuworker.state import LatentState


class ShapeRefused(Exception):
    """A setting that the model cannot do. Fields: `field`, the bad `value`, what is `allowed`."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value}: allowed is {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


@dataclass(frozen=True)
class CardFacts:
    """Plain facts of a model. Widths and heights are pixels; guidance is the scale's number."""

    name: str
    family: str
    workflows: tuple[str, ...]  # "txt2img", "txt2vid"
    sizes: tuple[tuple[int, int], ...]  # (width, height); empty: any within the next three
    size_multiple: int
    size_min: int
    size_max: int
    size_default: tuple[int, int]
    frames_max: int  # 1 for pictures
    frames_multiple: int  # frames are 1 + a multiple of this
    frames_default: int
    steps_min: int
    steps_max: int
    steps_default: int
    guidance: str  # "true_cfg": two forwards, or a batch of two; "embedded": an input; "none"
    guidance_min: float
    guidance_max: float
    guidance_default: float
    degrees: tuple[int, ...]  # of sequence parallelism
    examples: tuple[str, ...]  # prompts
    fps: int = 0  # frames per second that its videos are made for; 0 for pictures

    def check(
        self, width: int, height: int, frames: int, steps: int, guidance_scale: float
    ) -> None:
        """Raises `ShapeRefused` for the first setting that the model cannot do."""
        if self.sizes and (width, height) not in self.sizes:
            allowed = ", ".join(f"{w}x{h}" for w, h in self.sizes)
            raise ShapeRefused("size", f"{width}x{height}", allowed)
        for field, side in (("width", width), ("height", height)):
            if side % self.size_multiple or not self.size_min <= side <= self.size_max:
                allowed = f"{self.size_min}..{self.size_max}, multiples of {self.size_multiple}"
                raise ShapeRefused(field, side, allowed)
        if not 1 <= frames <= self.frames_max or (frames - 1) % self.frames_multiple:
            allowed = f"1..{self.frames_max}, one more than a multiple of {self.frames_multiple}"
            raise ShapeRefused("frames", frames, allowed)
        if not self.steps_min <= steps <= self.steps_max:
            raise ShapeRefused("steps", steps, f"{self.steps_min}..{self.steps_max}")
        if self.guidance != "none" and not (
            self.guidance_min <= guidance_scale <= self.guidance_max
        ):
            allowed = f"{self.guidance_min}..{self.guidance_max}"
            raise ShapeRefused("guidance_scale", guidance_scale, allowed)


class ModelCard(ABC):
    """A loaded model. One thread uses it."""

    facts: CardFacts

    def resolve(self, prompt: str) -> str:
        """The prompt that will really be drawn; the same text unless the model knows few words."""
        return prompt

    @abstractmethod
    def encode(
        self,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        frames: int,
        steps: int,
        guidance_scale: float,
        seed: int,
    ) -> LatentState:
        """The state before the first step: embeddings and the noise of `seed`, on the device.

        The noise is drawn on the CPU in float32, so that it is the same on every kind of device.
        Raises `ShapeRefused`.
        """

    @abstractmethod
    def step(self, state: LatentState, comm: Communicator | None) -> LatentState:
        """One denoising step with its guidance, over the members of `comm`.

        Every member calls it with the same state and gets the same new one. The old state is left
        as it was. Raises `elastic.DegreeRefused`, and whatever the communicator raises.
        """

    @abstractmethod
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        """The pictures of a finished state: uint8 [frames, height, width, 3]."""


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 noise on the CPU; a seed gives the same numbers everywhere."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def number(state: LatentState, name: str) -> float:
    """A numeric fact of a state."""
    value = state.facts[name]
    assert isinstance(value, int | float), (name, value)
    return value


def positioned(scheduler_class: Any, config: Mapping[str, Any], step: int, **schedule: Any) -> Any:
    """A fresh noise scheduler, its timesteps set by `schedule`, ready to make step `step`."""
    scheduler = scheduler_class.from_config(config)
    scheduler.set_timesteps(**schedule)
    scheduler.set_begin_index(step)
    return scheduler


def to_frames(pictures: Tensor) -> NDArray[np.uint8]:
    """float [frames, 3, H, W] in -1..1 to uint8 [frames, H, W, 3], rounded as diffusers does."""
    unit = (pictures.float() * 0.5 + 0.5).clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())
