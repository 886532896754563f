"""What a model family has to say: facts for everybody, and its operations for a worker.

A card owns weights and nothing of any request. All that a request needs between two steps is in its
`LatentState`, so that any worker which holds the state and the weights can make the next step.
What families whose parts are diffusers' own have in common stands in diffusers_card.py.

A request of the plain chain is encode / step / decode. In a workflow the same weights are called by
operation, and every artifact is a `LatentState` (no steps, unless a denoise node made it):

    embed ──embeddings──▶ begin ──▶ step … step ──latents──▶ decode
                          ▲ latents, mask, reference
    encode_image ─────────┘

A state that was begun steps like an encoded one, in one batch with it, and is the same state where
both say the same: `encode(…)` is `begin(embed(asked), asked)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuworker.attention.exchange import ParallelAttention
from gpuworker.collectives.team import Team
from gpuworker.models.footprint import ModelCall
from gpuworker.prompts import PromptCache
from gpuworker.state import LatentState

PLAIN_OPERATIONS = ("encode_prompt", "denoise", "decode")  # every model has them
# Of some: an operation, and "operation.port", an input that not every model's denoiser takes.
ENCODE_IMAGE, INPAINT, REFERENCE = "encode_image", "denoise.mask", "denoise.reference"
LORAS, CONTROLLED = "denoise.loras", "denoise.control"


class ShapeRefused(Exception):
    """A setting that the model cannot do. Fields: `field`, the bad `value`, what is `allowed`."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value}: allowed is {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class ModelRefused(Exception):
    """A model of a known family that is not of the kind served. Fields: `part`, `reason`."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"{part}: {reason}")
        self.part, self.reason = part, reason


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
    frames_multiple: int  # frames are `frames_offset` more than a multiple of this
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
    frames_min: int = 1
    frames_offset: int = 1
    fps: int = 0  # frames per second that its videos are made for; 0 for pictures
    branches_above: float = (
        1.0  # of true CFG: with a higher guidance scale, a step has two branches
    )
    pixels_max: int = 0  # width times height at most; 0: size_max times size_max

    def check(
        self, width: int, height: int, frames: int, steps: int, guidance_scale: float
    ) -> None:
        """Raises `ShapeRefused` for the first setting that the model cannot do."""
        self.check_size(width, height)
        low, high, multiple = self.frames_min, self.frames_max, self.frames_multiple
        offset = self.frames_offset % multiple
        if not low <= frames <= high or frames % multiple != offset:
            several = f"{offset} more than a multiple" if offset else "a multiple"
            allowed = f"{low}..{high}, {several} of {multiple}" if low < high else str(low)
            raise ShapeRefused("frames", frames, allowed)
        if not self.steps_min <= steps <= self.steps_max:
            raise ShapeRefused("steps", steps, f"{self.steps_min}..{self.steps_max}")
        if self.guidance != "none" and not (
            self.guidance_min <= guidance_scale <= self.guidance_max
        ):
            allowed = f"{self.guidance_min}..{self.guidance_max}"
            raise ShapeRefused("guidance_scale", guidance_scale, allowed)

    def check_size(self, width: int, height: int) -> None:
        """Raises `ShapeRefused` for a width or height that the model cannot do."""
        if self.sizes and (width, height) not in self.sizes:
            allowed = ", ".join(f"{w}x{h}" for w, h in self.sizes)
            raise ShapeRefused("size", f"{width}x{height}", allowed)
        for field, side in (("width", width), ("height", height)):
            if side % self.size_multiple or not self.size_min <= side <= self.size_max:
                allowed = f"{self.size_min}..{self.size_max}, multiples of {self.size_multiple}"
                raise ShapeRefused(field, side, allowed)
        if self.pixels_max and not self.sizes and width * height > self.pixels_max:
            raise ShapeRefused("size", f"{width}x{height}", f"at most {self.pixels_max} pixels")


class Asked(NamedTuple):
    """The settings of a job, which the model can do."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance_scale: float
    seed: int


class ModelCard(ABC):
    """A loaded model. One thread uses it."""

    facts: CardFacts
    prompts: PromptCache | None = None  # where embeddings are kept
    texts_id = ""  # whose they are, under which others may share them; empty: nobody's

    @property
    def operations(self) -> tuple[str, ...]:
        """What workflows may ask of it, `PLAIN_OPERATIONS` and more."""
        return PLAIN_OPERATIONS

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that a denoise node may ask for."""
        return ()

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
    def embed(self, asked: Asked) -> LatentState:
        """Embeddings of the prompts alone, with no latents, after no steps of none.

        They serve any seed, size, number of steps and guidance. Raises `ShapeRefused`.
        """

    @abstractmethod
    def begin(
        self,
        embeddings: LatentState,
        asked: Asked,
        latents: LatentState | None = None,
        strength: float = 1.0,
        mask: NDArray[np.uint8] | None = None,
        reference: LatentState | None = None,
        loras: Mapping[str, float] | None = None,
        control: LatentState | None = None,
        control_scale: float = 1.0,
    ) -> LatentState:
        """The state before the first of the steps that are to run: those of `strength`.

        From `latents` (finished, of the asked shape) with noise as the first of these steps expects
        it; without them from noise alone. With a `mask`, uint8 [1, height, width, 1], what is dark
        in it (below 128) is put back to `latents` after each step. A `reference`, latents of any
        size, is what an editing model looks at in each step. `loras` are scales of adapters by
        name. A `control` picture's latents, of the asked shape, steer the steps by a ControlNet,
        whose residuals are multiplied by its scale. Raises `ShapeRefused`, and `ModelRefused` for
        an adapter's file.

        The noise is that of the asked seed. Where `encode_image` has drawn from the same seed, its
        generator goes on, as in a stock pipeline that is given one generator. Latents of another
        denoise node need another seed: with the same one they would get the same noise again.
        """

    def adapted(self, state: LatentState, loras: Mapping[str, float]) -> LatentState:
        """A job's first state with LoRA adapters for its steps: their scales by name.

        No file is opened: whoever makes the first step does that. Raises `ShapeRefused`.
        """
        raise ShapeRefused("loras", ", ".join(sorted(loras)), "none: it has none")

    def encode_image(self, pixels: NDArray[np.uint8], seed: int) -> LatentState:
        """Latents of a picture, uint8 [1, height, width, 3], that `begin` and `decode` take.

        A VAE that says how sure it is (a posterior) is sampled as the stock pipelines do it, with a
        generator of `seed`, in float32 on the CPU; a reference is its "mean". Raises
        `ShapeRefused`, also where `ENCODE_IMAGE` is not among `operations`.
        """
        raise ShapeRefused("op", ENCODE_IMAGE, ", ".join(self.operations))

    @abstractmethod
    def step(self, states: Sequence[LatentState], team: Team | None) -> list[LatentState]:
        """One denoising step of each job, over the members of `team`.

        The jobs have one shape; each keeps its own seed, guidance and position. Every member calls
        it with the same states and gets the same new ones. The old states are left as they were.
        Raises `LayoutRefused`, `elastic.DegreeRefused`, and whatever the communicator raises.
        """

    @abstractmethod
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        """The pictures of finished latents: uint8 [frames, height, width, 3]."""

    def smaller_tiles(self) -> Iterator[AbstractContextManager[None]]:
        """Blocks in which decoding takes less memory than in the block before."""
        return iter(())

    def forget_decode(self) -> None:  # noqa: B027  some have nothing to forget
        """Drops what a decode that failed has left in the decoder."""

    @abstractmethod
    def compile(self, backend: str = "inductor") -> None:
        """Has the transformer's blocks compiled at their first use. Raises `ModelRefused`."""

    @abstractmethod
    def attend_by(self, attention: ParallelAttention) -> None:
        """Replaces what goes around attention where a sequence is split."""

    @abstractmethod
    def warm(self) -> None:
        """Makes one step of the default shape: what is compiled is compiled behind it."""

    @abstractmethod
    def activation_bytes(self, call: ModelCall) -> int:
        """What a call takes beside its weights, estimated (see footprint.py)."""
