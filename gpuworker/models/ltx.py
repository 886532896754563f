"""Family "ltx": LTXVideoTransformer3DModel, text to video, as diffusers' LTXPipeline runs it.

Both branches of guidance go through one forward. Only the video tokens are split over a group; the
text stays whole, so that cross-attention needs no exchange.

Later decoders are denoisers themselves: they are told a time, and a little noise is mixed into the
latents first. That noise is the second draw from the seed's generator, as in the pipeline. Decoders
that also draw noise inside get it from the seed, where the pipeline leaves it to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, degrees
from gpuworker.models.card import Asked, CardFacts, ModelRefused
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.frame_counts import frame_counts
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, number, stacked, timesteps_of
from gpuworker.models.solvers import dynamic_shift, schedule_steps
from gpuworker.state import LatentState

_TEXT_TOKENS = 128
_SIZE_MULTIPLE = 32  # asked for by the pipeline, whatever the VAE's factor is
_SIZE_MAX = 1280
_PIXELS_MAX = 1280 * 720  # of a frame, as its authors recommend at most
_FRAMES_MAX, _FRAMES_DEFAULT = 257, 161  # as its authors advise, and the pipeline's own
_FRAMES_PER_S = 25.0  # card.json: "frame_rate"


class LTXCard(DiffusersCard):
    """LTX-Video text to video. Raises `ModelRefused` for transformers with patches."""

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        config = parts["transformer"].config
        if (config.patch_size, config.patch_size_t) != (1, 1):
            # The pipeline's own position ids know of no other.
            raise ModelRefused("transformer", f"patch_size={config.patch_size}: allowed is 1")
        elastic = ElasticSP(parts["transformer"], joint=False, cross="attn2")
        super().__init__(parts, card, device, elastic)
        self.facts = self._facts(name)

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        channels = self._transformer.config.in_channels
        shape = (1, channels, *self._grid(asked.width, asked.height, asked.frames))
        unpacked = drawn(shape, generator)
        return {"latents": unpacked.flatten(2).transpose(1, 2).contiguous()}  # [1, N, C]

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        embeds, mask = self._embed(prompt)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae = self._parts["vae"]
        latents = state.tensors["latents"].to(self._device).transpose(1, 2)
        latents = latents.reshape(1, -1, *self._grid_of(state))  # [1, C, F, H, W]
        mean, std = (
            buffer.view(1, -1, 1, 1, 1).to(latents)
            for buffer in (vae.latents_mean, vae.latents_std)
        )
        latents = (latents * std / vae.config.scaling_factor + mean).to(self._dtype)
        time = None
        if vae.config.timestep_conditioning:
            at = float(self._card.get("decode_timestep", 0.0))
            share = latents.new_tensor(float(self._card.get("decode_noise_scale", at)))
            latents = (1 - share) * latents + share * self._second_draw(state).to(latents)
            time = latents.new_tensor([at])
        with torch.random.fork_rng(self._forked()):
            torch.manual_seed(int(number(state, "seed")))
            (video,) = vae.decode(latents.to(vae.dtype), time, return_dict=False)
        return to_frames(video[0].transpose(0, 1))

    def _facts(self, name: str) -> CardFacts:
        vae = self._parts["vae"]
        multiple = int(np.lcm(_SIZE_MULTIPLE, vae.spatial_compression_ratio))
        compression = vae.temporal_compression_ratio
        frames = frame_counts(self._card, compression, _FRAMES_MAX, _FRAMES_DEFAULT)
        return CardFacts(
            name=name,
            family="ltx",
            workflows=("txt2vid",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=multiple,
            size_max=_SIZE_MAX,
            pixels_max=_PIXELS_MAX,
            size_default=(704 // multiple * multiple, 512 // multiple * multiple),
            frames_max=frames.most,
            frames_multiple=frames.multiple,
            frames_default=frames.default,
            fps=int(self._card.get("fps", 25)),
            steps_min=1,
            steps_max=100,
            steps_default=50,
            guidance="true_cfg",
            guidance_min=1.0,
            guidance_max=20.0,
            guidance_default=3.0,
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 embeddings [1, T, D] of a prompt, and which of them are words: bool [1, T]."""
        encoded = self._parts["tokenizer"](
            [prompt],
            padding="max_length",
            max_length=self._card.get("text_tokens", _TEXT_TOKENS),
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        embeds = self._parts["text_encoder"](encoded.input_ids.to(self._device))[0]
        return embeds.to(self._dtype), encoded.attention_mask.bool()

    def _timing(self, state: LatentState) -> dict[str, Any]:
        steps, tokens = schedule_steps(state), state.tensors["latents"].shape[1]
        shift = dynamic_shift(tokens, self._parts["scheduler"].config)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift}

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        vae, rate = self._parts["vae"], float(self._card.get("frame_rate", _FRAMES_PER_S))
        frames, height, width = self._grid_of(rows[0].state)
        side = vae.spatial_compression_ratio
        velocity: Tensor
        (velocity,) = self._transformer(
            hidden_states=latents_of(rows).to(self._dtype),
            timestep=timesteps_of(rows),
            encoder_hidden_states=stacked(rows, "prompt_embeds", "negative_embeds"),
            encoder_attention_mask=stacked(rows, "prompt_mask", "negative_mask"),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(vae.temporal_compression_ratio / rate, side, side),
            return_dict=False,
        )
        return velocity.float()

    def _grid(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        vae = self._parts["vae"]
        side = vae.spatial_compression_ratio
        return (frames - 1) // vae.temporal_compression_ratio + 1, height // side, width // side

    def _grid_of(self, state: LatentState) -> tuple[int, int, int]:
        width, height, frames = (int(number(state, n)) for n in ("width", "height", "frames"))
        return self._grid(width, height, frames)

    def _second_draw(self, state: LatentState) -> Tensor:
        """Noise [1, C, F, H, W] that the seed's generator gives behind the first latents."""
        shape = (1, self._transformer.config.in_channels, *self._grid_of(state))
        generator = torch.Generator("cpu").manual_seed(int(number(state, "seed")))
        torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def _forked(self) -> list[torch.device]:
        """Devices, besides the CPU, whose random state decoding must leave alone."""
        return [self._device] if self._device.type == "cuda" else []
