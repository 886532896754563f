"""Family "flux": FluxTransformer2DModel, text to image.

Three kinds of folder share the transformer and the step; what differs is text, layout and guidance,
and that is a `FluxCard` method each:

- `FluxCard`: Flux as its authors publish it. CLIP and T5 text, latents packed 2x2, resolution-
  dependent shift of the noise schedule, guidance as an input of the transformer (or none at all).
  Same latents as diffusers' FluxPipeline. A folder of Kontext also takes the latents of a picture
  to be edited: they are further tokens of each step, at places of their own, and never change.
- `WordFluxCard`: our shipped small models. A word table as text encoder, one token a latent pixel,
  real classifier-free guidance: an unconditional row and a prompted one.
- `word_motion.WordMotionCard`: clips by the same means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, degrees
from gpuworker.attention.exchange import ParallelAttention
from gpuworker.collectives.team import Team
from gpuworker.models.card import CONTROLLED, REFERENCE, Asked, CardFacts, ShapeRefused
from gpuworker.models.decoding import decoded
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.flux_control import CONTROL, CONTROL_SCALE, FluxControl, controlled
from gpuworker.models.footprint import ModelCall
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, number, numbers_of, stacked, timesteps_of
from gpuworker.models.solvers import dynamic_shift, schedule_steps
from gpuworker.state import LatentState

_T5_TOKENS = 512
_SIZE_MAX = 2048
_REFERENCE, _REFERENCE_IDS = "reference.latents", "reference.ids"  # [1, N, C], [rows, columns, 3]
_EDITING = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
_TILED_OVER_PX = 1536 * 1536  # for the decoder; card.json may say otherwise


class FluxCard(DiffusersCard):
    """Flux with CLIP and T5 text encoders and AutoencoderKL."""

    takes_pictures = True
    tiled_over_px = _TILED_OVER_PX
    adapters_of = "flux"

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        elastic = ElasticSP(parts["transformer"], joint=True)
        super().__init__(parts, card, device, elastic)
        self._edits = card.get("pipeline") in _EDITING
        self._control = FluxControl(parts["controlnet"]) if "controlnet" in parts else None
        self.facts = self._facts(name)

    @property
    def operations(self) -> tuple[str, ...]:
        further = ((REFERENCE,) if self._edits else ()) + ((CONTROLLED,) if self._control else ())
        return super().operations + further

    def attend_by(self, attention: ParallelAttention) -> None:
        super().attend_by(attention)
        if self._control:
            self._control.elastic.attend_by(attention)

    @contextmanager
    def _shared(self, team: Team | None) -> Iterator[None]:
        second = self._control.elastic.step(team) if self._control else nullcontext()
        with super()._shared(team), second:
            yield

    def _controlled(self, state: LatentState, control: LatentState, scale: float) -> LatentState:
        if self._control is None or _REFERENCE in state.tensors:
            return super()._controlled(state, control, scale)
        return controlled(state, control, scale)

    def activation_bytes(self, call: ModelCall) -> int:
        # A picture to be edited has as many tokens as the one that is made.
        alone, stepped = super().activation_bytes(call), call.node in ("dit", "denoise")
        return 2 * alone if self._edits and stepped else alone

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        latents, ids = self._canvas(asked, generator)
        return {"latents": latents, "img_ids": ids}

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        latents = self._unpack(state.to(self._device))
        return self._pixels(latents.to(self._parts["vae"].dtype), state)

    def _pixels(self, latents: Tensor, state: LatentState) -> NDArray[np.uint8]:
        """Frames [F, H, W, 3] of latents [F, C, rows, columns]."""
        tiled_over_px = int(self._card.get("tiled_over_px", self.tiled_over_px))
        return to_frames(decoded(self._parts["vae"], latents, state, tiled_over_px))

    # What WordFluxCard and word_motion.py do otherwise.

    def _facts(self, name: str) -> CardFacts:
        embedded = bool(self._transformer.config.guidance_embeds)
        steps = 28 if embedded else 4
        multiple = 2 * self._vae_factor()
        side = int(self._card.get("size_default", 128 * self._vae_factor()))
        return CardFacts(
            name=name,
            family="flux",
            workflows=("txt2img",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=multiple,
            size_max=_SIZE_MAX,
            size_default=(side, side),
            frames_max=1,
            frames_multiple=1,
            frames_default=1,
            steps_min=1,
            steps_max=100,
            steps_default=steps,
            guidance="embedded" if embedded else "none",
            guidance_min=0.0,
            guidance_max=20.0,
            guidance_default=3.5 if embedded else 0.0,
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings [1, T, D] and pooled [1, P] of the prompt, and position ids [T, 3]."""
        clip, t5 = self._parts["text_encoder"], self._parts["text_encoder_2"]
        words = self._ids("tokenizer", prompt, self._parts["tokenizer"].model_max_length)
        pieces = self._ids("tokenizer_2", prompt, self._card.get("text_tokens", _T5_TOKENS))
        pooled = clip(words, output_hidden_states=False).pooler_output
        embeds = t5(pieces, output_hidden_states=False)[0]
        return {
            "prompt_embeds": embeds.to(self._dtype),
            "pooled": pooled.to(self._dtype),
            "txt_ids": torch.zeros(embeds.shape[1], 3, dtype=self._dtype),
        }

    def _canvas(self, asked: Asked, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Initial latents [1, N, C] and position ids [N, 3]."""
        factor = 2 * self._vae_factor()
        rows, columns = asked.height // factor, asked.width // factor
        channels = self._transformer.config.in_channels // 4
        unpacked = drawn((1, channels, 2 * rows, 2 * columns), generator).to(self._dtype)
        return self._packed(unpacked), _places(rows, columns).flatten(0, 1).to(self._dtype)

    def _referred(self, reference: LatentState) -> dict[str, Tensor]:
        if not self._edits:
            return super()._referred(reference)
        factor = 2 * self._vae_factor()
        rows = int(number(reference, "height")) // factor
        ids = _places(rows, int(number(reference, "width")) // factor)
        ids[..., 0] = 1  # tells it from the picture that is made
        tokens = reference.tensors.get("mean", reference.tensors["latents"])
        if tokens.shape != (1, ids[..., 0].numel(), self._transformer.config.in_channels):
            raise ShapeRefused("reference", list(tokens.shape), "latents of this family")
        return {_REFERENCE: tokens.to(self._dtype), _REFERENCE_IDS: ids.to(self._dtype)}

    def _timing(self, state: LatentState) -> dict[str, Any]:
        steps, tokens = schedule_steps(state), state.tensors["latents"].shape[1]
        config = self._parts["scheduler"].config
        shift = {"mu": dynamic_shift(tokens, config)}
        if config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps} | shift
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)} | shift

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        """One forward for all rows with references of one size, and controls of one scale."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(rows):
            ids, scale = row.state.tensors.get(_REFERENCE_IDS), row.state.facts.get(CONTROL_SCALE)
            kind = (scale,) if ids is None else (scale, *ids.shape)
            kinds.setdefault(kind, []).append(place)
        if len(kinds) == 1:
            return self._forward(rows)
        predicted: list[Tensor] = [row.latents for row in rows]
        for places in kinds.values():
            together = self._forward([rows[place] for place in places])
            for place, prediction in zip(places, together.split(1), strict=True):
                predicted[place] = prediction
        return torch.cat(predicted)

    def _forward(self, rows: Sequence[Row]) -> Tensor:
        first = rows[0].state.tensors
        guidance = None
        if self._transformer.config.guidance_embeds:
            guidance = numbers_of(rows, "guidance_scale")
        given, ids = self._input(rows), first["img_ids"]
        tokens = given.shape[1]
        if _REFERENCE in first:
            given = torch.cat([given, stacked(rows, _REFERENCE)], 1)
            ids = torch.cat([ids, first[_REFERENCE_IDS].flatten(0, 1)])
        arguments: dict[str, Any] = {
            "hidden_states": given,
            "timestep": timesteps_of(rows).to(given.dtype) / 1000,
            "guidance": guidance,
            "pooled_projections": stacked(rows, "pooled", "plain_pooled"),
            "encoder_hidden_states": stacked(rows, "prompt_embeds", "plain_embeds"),
            "txt_ids": first["txt_ids"],
            "img_ids": ids,
            "return_dict": False,
        }
        if self._control is not None and CONTROL in first:
            arguments |= self._control.residuals(rows, arguments)
        with self._adapters.of([row.state for row in rows], self._device):
            (velocity,) = self._transformer(**arguments)
        predicted: Tensor = velocity[:, :tokens]
        return predicted

    def _input(self, rows: Sequence[Row]) -> Tensor:
        """What the transformer sees of each row, token by token: [rows, N, in_channels]."""
        return latents_of(rows)

    def _unpack(self, state: LatentState) -> Tensor:
        """Latents [1, C, H, W] as the VAE wants them."""
        factor, config = 2 * self._vae_factor(), self._parts["vae"].config
        rows, columns = (
            int(number(state, "height")) // factor,
            int(number(state, "width")) // factor,
        )
        latents = state.tensors["latents"]
        latents = latents.view(1, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        unpacked: Tensor = latents.reshape(1, -1, 2 * rows, 2 * columns) / config.scaling_factor
        return unpacked + config.shift_factor

    def _scaled(self, latents: Tensor) -> Tensor:
        config = self._parts["vae"].config
        scaled: Tensor = (latents - config.shift_factor) * config.scaling_factor
        return scaled

    def _packed(self, latents: Tensor) -> Tensor:
        return packed(latents)

    def _latent_px(self) -> int:
        return self._vae_factor()

    def _ids(self, tokenizer: str, prompt: str, length: int) -> Tensor:
        """Token ids [1, length]."""
        encoded = self._parts[tokenizer](
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids.to(self._device)

    def _vae_factor(self) -> int:
        """Pixels of a latent pixel's side."""
        return int(2 ** (len(self._parts["vae"].config.block_out_channels) - 1))


class WordFluxCard(FluxCard):
    """Our own small models; the folder's card.json gives sizes, guidance and layout."""

    def resolve(self, prompt: str) -> str:
        resolved: str = self._parts["text_encoder"].resolve(prompt)
        return resolved

    def _facts(self, name: str) -> CardFacts:
        card = self._card
        sizes = tuple((int(w), int(h)) for w, h in card["sizes"])
        sides = [side for size in sizes for side in size]
        width, height = card["default_size"]
        return CardFacts(
            name=name,
            family="flux",
            workflows=("txt2img",),
            sizes=sizes,
            size_multiple=card["patch_px"],
            size_min=min(sides),
            size_max=max(sides),
            size_default=(width, height),
            frames_max=1,
            frames_multiple=1,
            frames_default=1,
            steps_min=card["steps"]["min"],
            steps_max=card["steps"]["max"],
            steps_default=card["steps"]["default"],
            guidance="true_cfg",
            guidance_min=card["guidance"]["min"],
            guidance_max=card["guidance"]["max"],
            guidance_default=card["guidance"]["default"],
            branches_above=-1.0,  # always
            degrees=degrees(self._transformer),
            examples=self._examples(),
        )

    def _examples(self) -> tuple[str, ...]:
        """Prompts from the card, or else the plain wording of the first things known."""
        if "examples" in self._card:
            return tuple(self._card["examples"])
        encoder = self._parts["text_encoder"]
        known = range(1, min(12, len(encoder.config.things)) + 1)
        return tuple(encoder.phrase(thing, 0) for thing in known)

    def _texts(self, asked: Asked, plain: bool) -> dict[str, Tensor]:
        """Embeddings [1, T, D] and pooled [1, P], prompted and plain; ids [T, 3]."""
        size_word = self._card["size_words"][f"{asked.width}x{asked.height}"]
        worded = [f"{text} {size_word}" for text in (asked.negative_prompt, asked.prompt)]
        return self._recalled(worded, lambda: self._worded(worded))

    def _worded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Of the plain and of the prompted text."""
        encoder = self._parts["text_encoder"]
        rows = [encoder.tokenize(text) for text in texts]
        embeds, pooled = encoder(torch.cat(rows).to(self._device))
        return {
            "plain_embeds": embeds[:1],
            "plain_pooled": pooled[:1],
            "prompt_embeds": embeds[1:],
            "pooled": pooled[1:],
            "txt_ids": encoder.text_ids(),
        }

    def _canvas(self, asked: Asked, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        patch, span = self._card["patch_px"], self._card["position_span"]
        rows, columns = asked.height // patch, asked.width // patch
        unpacked = drawn((1, self._transformer.config.in_channels, rows, columns), generator)
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] = ((torch.arange(rows) + 0.5) * span / rows)[:, None]
        ids[..., 2] = ((torch.arange(columns) + 0.5) * span / columns)[None]
        return self._packed(unpacked).to(self._dtype), ids.reshape(-1, 3)

    def _texts_of_any(self, asked: Asked) -> dict[str, Tensor]:
        """Those of each size, "name.64x64": the model is told the size in a word."""
        tensors: dict[str, Tensor] = {}
        for size in self._card["size_words"]:
            width, height = map(int, size.split("x"))
            texts = self._texts(asked._replace(width=width, height=height), plain=True)
            tensors |= {f"{name}.{size}": tensor for name, tensor in texts.items()}
        return tensors

    def _texts_chosen(self, embeddings: Mapping[str, Tensor], asked: Asked) -> dict[str, Tensor]:
        size = f".{asked.width}x{asked.height}"
        return {
            name.removesuffix(size): tensor
            for name, tensor in embeddings.items()
            if name.endswith(size)
        }

    def _timing(self, state: LatentState) -> dict[str, Any]:
        return {"num_inference_steps": schedule_steps(state)}

    def _unpack(self, state: LatentState) -> Tensor:
        patch = self._card["patch_px"]
        rows, columns = int(number(state, "height")) // patch, int(number(state, "width")) // patch
        latents = state.tensors["latents"].transpose(1, 2).reshape(1, -1, rows, columns)
        scaling, shift = float(self._card["latent_scaling"]), float(self._card["latent_shift"])
        return latents / scaling + shift

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - float(self._card["latent_shift"])) * float(self._card["latent_scaling"])

    def _packed(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2).contiguous()

    def _latent_px(self) -> int:
        return int(self._card["patch_px"])


def _places(rows: int, columns: int) -> Tensor:
    """float32 [rows, columns, 3]: the positions of a picture's tokens."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids


def packed(latents: Tensor) -> Tensor:
    """Latents [1, C, H, W] as one token for each 2x2 of their pixels: [1, H/2 * W/2, 4C]."""
    _, channels, height, width = latents.shape
    cut = latents.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(1, height // 2 * (width // 2), 4 * channels)
