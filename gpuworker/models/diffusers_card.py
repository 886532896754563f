"""What all families have in common whose parts are diffusers' own: they predict rows.

A step takes several jobs of one shape at once and may share the work in any layout. What it does is
the same for all families, and written here once:

    jobs x branches of guidance ──▶ rows ──▶ one forward ──▶ guidance ──▶ each job's own solver

Noise schedulers are taken anew for each step (solvers.py): nothing of one request can leak into
another, and a joining worker agrees by construction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP
from gpuworker.attention.exchange import ParallelAttention
from gpuworker.collectives.team import LayoutRefused, Team
from gpuworker.models import decoding, footprint, pictures
from gpuworker.models.adapters import Adapters, adapter_facts
from gpuworker.models.beginning import check_begin, check_texts
from gpuworker.models.card import (
    ENCODE_IMAGE,
    INPAINT,
    LORAS,
    PLAIN_OPERATIONS,
    Asked,
    ModelCard,
    ModelRefused,
    ShapeRefused,
)
from gpuworker.models.footprint import ModelCall
from gpuworker.models.rows import PLAIN, PROMPTED, Row, number, seeded, skip
from gpuworker.models.solvers import FIRST_STEP, Schedules, Solver, check_solver, kept
from gpuworker.state import Fact, LatentState
from hocket.strength import steps_to_run

_ASKED_FACTS = ("prompt", "width", "height", "frames", "guidance_scale", "seed")


class DiffusersCard(ModelCard):
    """The step of every family whose parts are diffusers' own. Raises `solvers.SolverRefused`."""

    # Whether the stock pipeline makes both branches in one forward; the pictures equal its own.
    branches_together = True
    takes_pictures = False  # whether `encode_image` is there, and with it masks
    adapters_of = ""  # whose LoRA adapters it takes: a key of adapters.CONVERTERS
    tiled_over_px = 1 << 62  # pixels of a picture from which its VAE works in tiles

    def __init__(
        self, parts: dict[str, Any], card: dict[str, Any], device: torch.device, elastic: ElasticSP
    ) -> None:
        check_solver(parts["scheduler"])
        self._parts, self._card, self._device, self._elastic = parts, card, device, elastic
        self._transformer: Any = parts["transformer"]
        self._dtype: torch.dtype = self._transformer.dtype
        self._schedules = Schedules(parts["scheduler"])
        files = {Path(file).stem: Path(file) for file in card.get("adapters", ())}
        self._adapters = Adapters(self.adapters_of, files, self._transformer)

    @property
    def operations(self) -> tuple[str, ...]:
        pictured = (ENCODE_IMAGE, INPAINT) if self.takes_pictures else ()
        return PLAIN_OPERATIONS + pictured + ((LORAS,) if self.adapters else ())

    @property
    def adapters(self) -> tuple[str, ...]:
        # What is compiled would be compiled anew for each set of adapters.
        return self._adapters.names if self.adapters_of and not self._elastic.compiled else ()

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
        scale = float(guidance_scale)
        asked = Asked(prompt, negative_prompt, width, height, frames, steps, scale, seed)
        check_texts(self.facts, asked)
        texts = self._texts(asked, plain=self._has_branches(scale))
        return self._noise_alone(self._begun(texts, asked, asked.steps, seeded(seed)))

    @torch.inference_mode()
    def embed(self, asked: Asked) -> LatentState:
        check_texts(self.facts, asked)
        facts: dict[str, Fact] = {"prompt": asked.prompt, "made_by": type(self).__name__}
        return LatentState(self._texts_of_any(asked), 0, 0, facts).to(self._device)

    @torch.inference_mode()
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
        maker, inpaints = type(self).__name__, self.takes_pictures
        check_begin(self.facts, maker, inpaints, embeddings, asked, latents, strength, mask)
        given = self._texts_chosen(embeddings.tensors, asked)
        if reference is not None:
            given |= self._referred(reference)
        adapted = self._lora_facts(loras or {})
        self._adapters.load(loras or {})
        generator = _behind(latents or control, asked.seed)
        steps = asked.steps if latents is None else steps_to_run(asked.steps, strength)
        begun = self._begun(given, asked, steps, generator, adapted)
        if control is not None:
            begun = self._controlled(begun, control, control_scale)
        return self._noise_alone(begun) if latents is None else self._from(begun, latents, mask)

    def adapted(self, state: LatentState, loras: Mapping[str, float]) -> LatentState:
        return replace(state, facts={**state.facts, **self._lora_facts(loras)})

    @torch.inference_mode()
    def encode_image(self, pixels: NDArray[np.uint8], seed: int) -> LatentState:
        if not self.takes_pictures:
            return super().encode_image(pixels, seed)
        width, height = pictures.check_picture(pixels, self.facts)
        vae = self._parts["vae"]
        tiled_over_px = int(self._card.get("tiled_over_px", self.tiled_over_px))
        tiles = decoding.tiles(vae, width * height > tiled_over_px)
        picture = pictures.picture(pixels, self._device).to(vae.dtype)
        made = pictures.sampled(vae, self._vae_input(picture), seeded(seed), tiles)
        facts: dict[str, Fact] = dict(width=width, height=height, frames=1, seed=seed)
        facts["drawn"] = made.drawn
        tensors = {"latents": self._packed(self._scaled(made.latents))}
        if made.mean is not None:
            tensors["mean"] = self._packed(self._scaled(made.mean))
        return LatentState(tensors, 0, 0, facts)

    @torch.inference_mode()
    def step(self, states: Sequence[LatentState], team: Team | None) -> list[LatentState]:
        here = [state.to(self._device) for state in states]
        if any(s.tensors["latents"].shape != here[0].tensors["latents"].shape for s in here):
            raise ValueError("jobs that step together have one shape")
        solvers = [self._solver(state) for state in here]
        rows = {
            branch: [
                Row(state, branch, solver.scaled(state.tensors["latents"]), solver.timestep)
                for state, solver in zip(here, solvers, strict=True)
                if branch == PROMPTED or self._guided(state)
            ]
            for branch in (PROMPTED, PLAIN)
        }
        with self._shared(team):
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
        if call.node in ("text", "encode_prompt"):
            return footprint.text_bytes(self._parts["text_encoder"].config, element_bytes)
        vae = self._parts["vae"]
        if call.node in ("vae", "decode", "encode_image"):  # an encoder is a decoder turned round
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

    # How a job begins.

    def _lora_facts(self, loras: Mapping[str, float]) -> Mapping[str, Fact]:
        for name in sorted(set(loras) - set(self.adapters)):
            raise ShapeRefused("loras", name, ", ".join(self.adapters) or "none: it has none")
        return adapter_facts(loras)

    def _begun(
        self,
        given: Mapping[str, Tensor],
        asked: Asked,
        steps: int,
        generator: torch.Generator,
        further: Mapping[str, Fact] = MappingProxyType({}),
    ) -> LatentState:
        """Before the first of the last `steps` steps; its latents are noise and nothing else."""
        facts: dict[str, Fact] = {name: getattr(asked, name) for name in _ASKED_FACTS}
        if steps < asked.steps:
            facts[FIRST_STEP] = asked.steps - steps
        facts |= further
        tensors = {**given, **self._blank(asked, generator)}
        return LatentState(tensors, 0, steps, facts).to(self._device)

    def _noise_alone(self, state: LatentState) -> LatentState:
        """As the first step of all expects it."""
        return state

    def _from(
        self, state: LatentState, latents: LatentState, mask: NDArray[np.uint8] | None
    ) -> LatentState:
        """A state that has noise alone, begun from `latents`."""
        drawn = state.tensors["latents"]
        clean = latents.tensors["latents"].to(drawn)
        width, height = int(number(state, "width")), int(number(state, "height"))
        if clean.shape != drawn.shape:
            found = "{width}x{height}".format(**latents.facts)
            raise ShapeRefused("latents", found, f"those of {width}x{height} of this family")
        tensors = {"latents": self._solver(state).noised(clean, drawn)}
        if mask is not None:
            anew = pictures.latent_mask(mask, width, height, self._latent_px()).to(drawn)
            tensors |= kept(clean, drawn, self._packed(anew.expand(-1, self._channels(), -1, -1)))
        return replace(state, tensors={**state.tensors, **tensors})

    def _shared(self, team: Team | None) -> AbstractContextManager[None]:
        """A block in which forwards run over `team`."""
        return self._elastic.step(team)

    def _solver(self, state: LatentState) -> Solver:
        return self._schedules.solver(state, self._timing(state) | {"device": self._device})

    def _has_branches(self, guidance_scale: float) -> bool:
        facts = self.facts
        return facts.guidance == "true_cfg" and guidance_scale > facts.branches_above

    def _texts(self, asked: Asked, plain: bool) -> dict[str, Tensor]:
        """Embeddings of the prompt; with `plain` of the other branch, named "negative_…"."""
        tensors = self._recalled((asked.prompt,), partial(self._prompted, asked.prompt))
        if plain:
            text = asked.negative_prompt
            other = self._recalled((text,), partial(self._prompted, text))
            tensors |= {f"negative_{k.removeprefix('prompt_')}": v for k, v in other.items()}
        return tensors

    def _recalled(
        self, texts: Sequence[str], encode: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `encode` makes of these texts, once for all who ask."""
        if self.prompts is None or not self.texts_id:
            return encode()
        return dict(self.prompts.recall((self.texts_id, *texts), encode))

    def _texts_of_any(self, asked: Asked) -> dict[str, Tensor]:
        """Embeddings for every guidance and shape."""
        return self._texts(asked, plain=self.facts.guidance == "true_cfg")

    def _texts_chosen(self, embeddings: Mapping[str, Tensor], asked: Asked) -> dict[str, Tensor]:
        """Those of them that the job needs."""
        plain = self._has_branches(asked.guidance_scale)
        return {
            name: tensor
            for name, tensor in embeddings.items()
            if plain or not name.startswith("negative_")
        }

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
    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings of a text, named "prompt_…", or otherwise."""

    @abstractmethod
    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        """Standard normal noise as "latents", and whatever else follows from their shape."""

    @abstractmethod
    def _predict(self, rows: Sequence[Row]) -> Tensor:
        """The transformer's prediction for each row, [rows, …] in the shape of the latents."""

    @abstractmethod
    def _timing(self, state: LatentState) -> dict[str, Any]:
        """Arguments for `set_timesteps` of the noise scheduler, without the device."""

    def _guided(self, state: LatentState) -> bool:
        """Whether the job has a plain branch."""
        return self._has_branches(number(state, "guidance_scale"))

    def _guide(self, state: LatentState, prompted: Tensor, plain: Tensor) -> Tensor:
        """Classifier-free guidance, as the stock pipeline of the family computes it."""
        return plain + number(state, "guidance_scale") * (prompted - plain)

    # What a family says that takes pictures.

    def _vae_input(self, picture: Tensor) -> Tensor:
        """[1, 3, H, W] as the VAE's encoder wants it."""
        return picture

    def _scaled(self, latents: Tensor) -> Tensor:
        """The VAE's raw latents as [1, C, H, W] on the scale that the transformer works on."""
        raise NotImplementedError

    def _packed(self, latents: Tensor) -> Tensor:
        """Latents [1, C, H, W] in the layout of a state."""
        return latents

    def _referred(self, reference: LatentState) -> dict[str, Tensor]:
        """What the steps need of latents that an editing model looks at."""
        allowed = f"none: this {self.facts.family} edits no pictures"
        raise ShapeRefused("reference", "latents", allowed)

    def _controlled(self, state: LatentState, control: LatentState, scale: float) -> LatentState:
        """A begun job with a control picture, for the ControlNet of the model."""
        raise ShapeRefused(
            "control", "latents", f"none: this {self.facts.family} has no ControlNet"
        )

    def _latent_px(self) -> int:
        """Pixels of a latent pixel's side."""
        raise NotImplementedError

    def _channels(self) -> int:
        """C, before packing."""
        return int(self._parts["vae"].config.latent_channels)


def _behind(picture: LatentState | None, seed: int) -> torch.Generator:
    """A generator of `seed`, behind what was drawn from its like to encode the picture."""
    generator = seeded(seed)
    if picture is not None and picture.facts.get("seed") == seed and "drawn" in picture.facts:
        skip(generator, int(number(picture, "drawn")))
    return generator
