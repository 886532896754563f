"""What a model family has to say: facts for everybody, and encode / step / decode for a worker.

A card owns weights and nothing of any request. All that a request needs between two steps is in its
`LatentState`, so that any worker which holds the state and the weights can make the next step.
Noise schedulers are taken anew for each step (solvers.py): nothing of one request can leak into
another, and a joining worker agrees by construction.

A step takes several jobs of one shape at once and may share the work in any layout. What it does is
the same for all families, and written here once; a family predicts rows:

    jobs x branches of guidance ──▶ rows ──▶ one forward ──▶ guidance ──▶ each job's own solver
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP
from gpuworker.attention.exchange import ParallelAttention
from gpuworker.collectives.team import LayoutRefused, Team
from gpuworker.models import decoding, footprint
from gpuworker.models.footprint import ModelCall
from gpuworker.models.solvers import Schedules, check_solver
from gpuworker.state import Fact, LatentState

PROMPTED, PLAIN = 0, 1  # branches of guidance; also the halves of a group that share them


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
        if self.sizes and (width, height) not in self.sizes:
            allowed = ", ".join(f"{w}x{h}" for w, h in self.sizes)
            raise ShapeRefused("size", f"{width}x{height}", allowed)
        for field, side in (("width", width), ("height", height)):
            if side % self.size_multiple or not self.size_min <= side <= self.size_max:
                allowed = f"{self.size_min}..{self.size_max}, multiples of {self.size_multiple}"
                raise ShapeRefused(field, side, allowed)
        if self.pixels_max and not self.sizes and width * height > self.pixels_max:
            raise ShapeRefused("size", f"{width}x{height}", f"at most {self.pixels_max} pixels")
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
    def step(self, states: Sequence[LatentState], team: Team | None) -> list[LatentState]:
        """One denoising step of each job, over the members of `team`.

        The jobs have one shape; each keeps its own seed, guidance and position. Every member calls
        it with the same states and gets the same new ones. The old states are left as they were.
        Raises `LayoutRefused`, `elastic.DegreeRefused`, and whatever the communicator raises.
        """

    @abstractmethod
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        """The pictures of a finished state: uint8 [frames, height, width, 3]."""

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


class Row(NamedTuple):
    """One row of a forward: a job, and the branch of its guidance."""

    state: LatentState
    branch: int  # PROMPTED or PLAIN
    latents: Tensor  # [1, …], as the model wants them
    timestep: Tensor  # []


class DiffusersCard(ModelCard):
    """The step of every family whose parts are diffusers' own. Raises `solvers.SolverRefused`."""

    # Whether the stock pipeline makes both branches in one forward; the pictures equal its own.
    branches_together = True

    def __init__(
        self, parts: dict[str, Any], card: dict[str, Any], device: torch.device, elastic: ElasticSP
    ) -> None:
        check_solver(parts["scheduler"])
        self._parts, self._card, self._device, self._elastic = parts, card, device, elastic
        self._transformer: Any = parts["transformer"]
        self._dtype: torch.dtype = self._transformer.dtype
        self._schedules = Schedules(parts["scheduler"])

    @property
    def transformer(self) -> Any:
        """The diffusers module whose steps these are."""
        return self._transformer

    @torch.inference_mode()
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
        self.facts.check(width, height, frames, steps, guidance_scale)
        if negative_prompt and self.facts.guidance != "true_cfg":
            raise ShapeRefused("negative_prompt", negative_prompt, "none: this model has no CFG")
        scale = float(guidance_scale)
        asked = Asked(prompt, negative_prompt, width, height, frames, steps, scale, seed)
        facts: dict[str, Fact] = dict(prompt=prompt, width=width, height=height, frames=frames)
        facts.update(guidance_scale=scale, seed=seed)
        return LatentState(self._first(asked), 0, steps, facts).to(self._device)

    @torch.inference_mode()
    def step(self, states: Sequence[LatentState], team: Team | None) -> list[LatentState]:
        here = [state.to(self._device) for state in states]
        if any(s.tensors["latents"].shape != here[0].tensors["latents"].shape for s in here):
            raise ValueError("jobs that step together have one shape")
        solvers = [
            self._schedules.solver(state, self._timing(state) | {"device": self._device})
            for state in here
        ]
        rows = {
            branch: [
                Row(state, branch, solver.scaled(state.tensors["latents"]), solver.timestep)
                for state, solver in zip(here, solvers, strict=True)
                if branch == PROMPTED or self._guided(state)
            ]
            for branch in (PROMPTED, PLAIN)
        }
        with self._elastic.step(team):
            prompted, plain = self._branches(rows, team)
        behind, rest = [], list(plain)
        for state, solver, prediction in zip(here, solvers, prompted, strict=True):
            if self._guided(state):
                prediction = self._guide(state, prediction, rest.pop(0))
            behind.append(solver.step(prediction))
        return behind

    def smaller_tiles(self) -> Iterator[AbstractContextManager[None]]:
        return decoding.smaller_tiles(self._parts["vae"])

    def forget_decode(self) -> None:
        decoding.forget(self._parts["vae"])

    def compile(self, backend: str = "inductor") -> None:
        if not getattr(self._transformer, "_repeated_blocks", None):
            family = type(self._transformer).__name__
            raise ModelRefused("compile", f"diffusers names no repeated blocks of {family}")
        self._transformer.compile_repeated_blocks(backend=backend)
        self._elastic.compiled = True

    def attend_by(self, attention: ParallelAttention) -> None:
        self._elastic.attend_by(attention)

    def warm(self) -> None:
        facts = self.facts
        width, height = facts.size_default
        guidance = facts.guidance_default
        steps = facts.steps_default
        state = self.encode("", "", width, height, facts.frames_default, steps, guidance, seed=0)
        self.step([state], None)

    def activation_bytes(self, call: ModelCall) -> int:
        element_bytes = self._dtype.itemsize
        if call.node == "text":
            return footprint.text_bytes(self._parts["text_encoder"].config, element_bytes)
        vae = self._parts["vae"]
        if call.node == "vae":
            tiled_over_px = int(self._card.get("tiled_over_px", 1 << 62))
            return footprint.decoder_bytes(vae.config, call, tiled_over_px, vae.dtype.itemsize)
        return footprint.denoiser_bytes(
            self._transformer.config,
            call,
            self.facts.size_multiple,
            self._frames_a_token(),
            element_bytes,
            self.facts.guidance == "true_cfg",
        )

    def _frames_a_token(self) -> int:
        """Frames that one token of the denoiser stands for."""
        return self.facts.frames_multiple

    def _branches(
        self, rows: Mapping[int, list[Row]], team: Team | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Predictions [1, …] of the prompted rows and of the plain ones."""
        if team is not None and team.layout.cfg == 2:
            count = len(rows[PROMPTED])
            if len(rows[PLAIN]) < count:
                raise LayoutRefused("layout.cfg", 2, "1: a job has no guidance, or embedded one")
            mine = self._predict(rows[team.half])
            both = team.halves().all_gather(mine, 0, [count, count])
            return both[:count].split(1), both[count:].split(1)
        if self.branches_together and rows[PLAIN]:
            count = len(rows[PLAIN])
            both = self._predict([*rows[PLAIN], *rows[PROMPTED]])
            return both[count:].split(1), both[:count].split(1)
        prompted = self._predict(rows[PROMPTED]).split(1)
        return prompted, self._predict(rows[PLAIN]).split(1) if rows[PLAIN] else ()

    # What a family says.

    @abstractmethod
    def _first(self, asked: Asked) -> dict[str, Tensor]:
        """The tensors before the first step: "latents", text, whatever else a step needs."""

    @abstractmethod
    def _predict(self, rows: Sequence[Row]) -> Tensor:
        """The transformer's prediction for each row, [rows, …] in the shape of the latents."""

    @abstractmethod
    def _timing(self, state: LatentState) -> dict[str, Any]:
        """Arguments for `set_timesteps` of the noise scheduler, without the device."""

    def _guided(self, state: LatentState) -> bool:
        """Whether the job has a plain branch."""
        facts = self.facts
        return facts.guidance == "true_cfg" and number(state, "guidance_scale") > (
            facts.branches_above
        )

    def _guide(self, state: LatentState, prompted: Tensor, plain: Tensor) -> Tensor:
        """Classifier-free guidance, as the stock pipeline of the family computes it."""
        return plain + number(state, "guidance_scale") * (prompted - plain)


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
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def number(state: LatentState, name: str) -> float:
    """A numeric fact of a state."""
    value = state.facts[name]
    assert isinstance(value, int | float), (name, value)
    return value


def to_frames(pictures: Tensor) -> NDArray[np.uint8]:
    """float [frames, 3, H, W] in -1..1 to uint8 [frames, H, W, 3], rounded as diffusers does."""
    unit = (pictures.float() * 0.5 + 0.5).clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())
