"""Family "cogvideox": CogVideoXTransformer3DModel, text to video, as diffusers' CogVideoXPipeline.

Guidance is a batch of two rows, plain and prompted. Text and video tokens attend to each other in
one sequence, and both are split over a group. Positions are added to the tokens (2b, sines) or turn
them (5b, rotary); 1.5 also joins neighbouring frames into one token, for which the video is padded
by leading latent frames that are thrown away in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, Plan, degrees
from gpuworker.collectives.team import Team
from gpuworker.models.card import Asked, CardFacts
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.frame_counts import frame_counts
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, number, stacked, timesteps_of
from gpuworker.models.solvers import noise_memory, schedule_steps
from gpuworker.state import LatentState

_TEXT_TOKENS = 226
_WIDTH_MAX, _HEIGHT_DEFAULT_MAX = 1360, 768
# Of its models' cards: of 1.0 and of 1.5, which joins frames.
_FRAMES_MAX, _FRAMES_MAX_15 = 49, 161
_FPS, _FPS_15 = 8, 16
_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)  # [B, tokens, D]
_PLAN: Plan = {
    "": {"image_rotary_emb": ContextParallelInput(split_dim=0, expected_dims=2)},
    "transformer_blocks.0": {"encoder_hidden_states": _TOKENS, "hidden_states": _TOKENS},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class CogVideoXCard(DiffusersCard):
    """CogVideoX 1.0 and 1.5 text to video."""

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        super().__init__(
            parts, card, device, ElasticSP(parts["transformer"], joint=True, plan=_PLAN)
        )
        self.facts = self._facts(name)

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        spatial = self._spatial_factor()
        shape = (  # [1, F, C, H, W]
            1,
            self._latent_frames(asked.frames) + self._padding(asked.frames),
            self._transformer.config.in_channels,
            asked.height // spatial,
            asked.width // spatial,
        )
        tensors = {"latents": drawn(shape, generator).to(self._dtype)}
        return tensors | noise_memory(self._parts["scheduler"], generator)

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        return {"prompt_embeds": self._embed(prompt)}

    def step(self, states: Sequence[LatentState], team: Team | None) -> list[LatentState]:
        """As of any card. The pipeline guides and solves in float32 and then rounds: so do we."""
        return [self._rounded(state) for state in super().step(states, team)]

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae = self._parts["vae"]
        latents = state.tensors["latents"].to(self._device, vae.dtype)
        latents = latents[:, self._padding(int(number(state, "frames"))) :].transpose(1, 2)
        (video,) = vae.decode(1 / vae.config.scaling_factor * latents, return_dict=False)
        return to_frames(video[0].transpose(0, 1))  # of [1, 3, F, H, W]

    def _facts(self, name: str) -> CardFacts:
        config, spatial = self._transformer.config, self._spatial_factor()
        multiple = spatial * config.patch_size
        width = min(spatial * config.sample_width, _WIDTH_MAX) // multiple * multiple
        height = min(spatial * config.sample_height, _HEIGHT_DEFAULT_MAX) // multiple * multiple
        sizes = tuple((w, h) for w, h in self._card.get("sizes", ()))
        learned = config.use_learned_positional_embeddings  # for one size and one length
        if learned:
            sizes = ((width, height),)
        # The VAE decodes an odd number of latent frames to 1 + 4 (n - 1), but an even one to 4 n.
        stride = 2 * self._parts["vae"].config.temporal_compression_ratio
        later = bool(config.patch_size_t)
        most, fps = (_FRAMES_MAX_15, _FPS_15) if later else (_FRAMES_MAX, _FPS)
        frames = frame_counts(self._card, stride, most, config.sample_frames)
        return CardFacts(
            name=name,
            family="cogvideox",
            workflows=("txt2vid",),
            sizes=sizes,
            size_multiple=multiple,
            size_min=multiple,
            size_max=_WIDTH_MAX // multiple * multiple,
            size_default=(width, height),
            frames_min=frames.default if learned else 1,
            frames_max=frames.default if learned else frames.most,
            frames_multiple=frames.multiple,
            frames_default=frames.default,
            fps=int(self._card.get("fps", fps)),
            steps_min=1,
            steps_max=100,
            steps_default=50,
            guidance="true_cfg",
            guidance_min=1.0,
            guidance_max=20.0,
            guidance_default=6.0,
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _spatial_factor(self) -> int:
        """Pixels of a latent pixel's side."""
        return 2 ** (len(self._parts["vae"].config.block_out_channels) - 1)

    def _frames_a_token(self) -> int:
        along_time = self._transformer.config.patch_size_t or 1
        return int(self._parts["vae"].config.temporal_compression_ratio) * int(along_time)

    def _latent_frames(self, frames: int) -> int:
        return (frames - 1) // int(self._parts["vae"].config.temporal_compression_ratio) + 1

    def _padding(self, frames: int) -> int:
        """Latent frames put before the video, so that patches of several frames fit."""
        return -self._latent_frames(frames) % (self._transformer.config.patch_size_t or 1)

    def _embed(self, prompt: str) -> Tensor:
        """T5 embeddings [1, T, D] of a prompt; those of padding count like any other."""
        encoded = self._parts["tokenizer"](
            [prompt],
            padding="max_length",
            max_length=self._card.get("text_tokens", _TEXT_TOKENS),
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        hidden: Tensor = self._parts["text_encoder"](encoded.input_ids.to(self._device))[0]
        return hidden.to(self._dtype)

    def _timing(self, state: LatentState) -> dict[str, Any]:
        return {"num_inference_steps": schedule_steps(state)}

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        noise: Tensor
        (noise,) = self._transformer(
            hidden_states=latents_of(rows),
            encoder_hidden_states=stacked(rows, "prompt_embeds", "negative_embeds"),
            timestep=timesteps_of(rows),
            image_rotary_emb=self._rotary(rows[0].latents),
            return_dict=False,
        )
        return noise.float()

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [video tokens, D] for latents [1, F, C, H, W]."""
        config = self._transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        patch, along_time = config.patch_size, config.patch_size_t
        frames, _, *sides = latents.shape[1:]
        grid = tuple(side // patch for side in sides)
        base = config.sample_height // patch, config.sample_width // patch
        cosines: Tensor
        sines: Tensor
        if along_time is None:
            cosines, sines = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                crops_coords=get_resize_crop_region_for_grid(grid, base[1], base[0]),
                grid_size=grid,
                temporal_size=frames,
                device=self._device,
            )
        else:
            cosines, sines = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                crops_coords=None,
                grid_size=grid,
                temporal_size=(frames + along_time - 1) // along_time,
                grid_type="slice",
                max_size=base,
                device=self._device,
            )
        return cosines, sines

    def _rounded(self, state: LatentState) -> LatentState:
        latents = state.tensors["latents"].to(self._dtype)
        return replace(state, tensors={**state.tensors, "latents": latents})
