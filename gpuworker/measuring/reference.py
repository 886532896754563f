"""The plain `diffusers` loop for the shipped models: no card, no engine, no groups, no mesh.

What the mesh's latents are compared with in tests and its times in `make bench`. It shares nothing
with `models/flux.py` and `word_motion.py` on purpose, so that a mistake there cannot hide here.

`python -m gpuworker.measuring.reference [FOLDER]` reads lines of {"prompt", "side", "seed",
"steps"} and answers each with {"step_us": [...], "whole_us": ...}: of the denoising steps, and of
all from the prompt to the finished file.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from gpuworker.models.word_text import WordTextEncoder
from gpuworker.steps.media import encode_media
from hocket.clock import steady_ns

_PLAIN = {"low_cpu_mem_usage": False}  # the other way needs accelerate, and says so
Canvas = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # noise, positions, more input channels
ASSETS = Path(__file__).parent.parent / "assets" / "hocket-emoji"


@dataclass(frozen=True)
class Reference:
    """The embedded model's components, in float32, and what its card.json says."""

    text_encoder: WordTextEncoder
    transformer: Any
    vae: Any
    scheduler: Any
    card: dict[str, Any]

    @classmethod
    def load(cls, folder: Path = ASSETS) -> Reference:
        torch.set_num_threads(1)
        return cls(
            WordTextEncoder.from_pretrained(folder / "text_encoder", **_PLAIN).float().eval(),
            FluxTransformer2DModel.from_pretrained(folder / "transformer", **_PLAIN).float().eval(),
            AutoencoderTiny.from_pretrained(folder / "vae", **_PLAIN).float().eval(),
            FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            json.loads((folder / "card.json").read_text()),
        )

    @torch.no_grad()
    def denoise(
        self,
        prompt: str,
        side: int,
        seed: int,
        steps: int,
        guidance: float,
        stop_after: int | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Final latent tokens [1, (side/8)², channels], and the time of each step in µs."""
        size_word = self.card["size_words"][f"{side}x{side}"]
        ids = [self.text_encoder.tokenize(f"{text} {size_word}") for text in ("", prompt)]
        embeds, pooled = self.text_encoder(torch.cat(ids))
        tokens, places, told = self._clip(side, seed) if self.frames > 1 else self._one(side, seed)
        self.scheduler.set_timesteps(steps)
        took_us = []
        for timestep in self.scheduler.timesteps[:stop_after]:
            began_ns = steady_ns()
            (velocity,) = self.transformer(
                hidden_states=torch.cat([torch.cat([tokens, told], 2)] * 2),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=timestep.expand(2) / 1000,
                img_ids=places,
                txt_ids=self.text_encoder.text_ids(),
                return_dict=False,
            )
            plain, prompted = velocity.chunk(2)
            guided = plain + guidance * (prompted - plain)
            (tokens,) = self.scheduler.step(guided, timestep, tokens, return_dict=False)
            took_us.append((steady_ns() - began_ns) // 1000)
        return tokens, took_us

    @property
    def frames(self) -> int:
        """Of what the model makes; 1 for pictures."""
        return int(self.card.get("frames", 1))

    def _one(self, side: int, seed: int) -> Canvas:
        rows, span = side // self.card["patch_px"], self.card["position_span"]
        ticks = (torch.arange(rows) + 0.5) * span / rows
        places = torch.zeros(rows, rows, 3)
        places[..., 1], places[..., 2] = ticks[:, None], ticks[None]
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.vae.config.latent_channels, rows, rows)
        tokens = torch.randn(shape, generator=generator).flatten(2).transpose(1, 2)
        return tokens, places.reshape(-1, 3), torch.zeros(1, rows * rows, 0)

    def _clip(self, side: int, seed: int) -> Canvas:
        """Some frames a token; the last channels say when and where it is."""
        rows, each = side // self.card["patch_px"], self.card["frames_a_token"]
        times, channels = self.frames // each, self.vae.config.latent_channels
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn((1, self.frames, channels, rows, rows), generator=generator)
        pairs = drawn.view(times, each, channels, rows * rows)
        tokens = pairs.permute(0, 3, 1, 2).reshape(1, times * rows * rows, each * channels)
        middle = (torch.arange(rows) + 0.5) / rows
        when, down, across = torch.meshgrid(
            torch.arange(times) / times, middle, middle, indexing="ij"
        )
        span = self.card["position_span"]
        places = torch.stack([when * -self.card["time_span"], down * span, across * span], 3)
        share = when.flatten() + 0.5 / times
        turn = 2 * math.pi * share
        waves = [turn.sin(), turn.cos(), (2 * turn).sin(), (2 * turn).cos(), (4 * turn).sin()]
        where = [2 * down.flatten() - 1, 2 * across.flatten() - 1]
        told = torch.stack([*waves, 2 * share - 1, *where], 1)
        return tokens, places.reshape(-1, 3), told[None]

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        """uint8 RGB [side, side, 3]; of a clip [frames, side, side, 3]."""
        rows, channels = side // self.card["patch_px"], self.vae.config.latent_channels
        frames = tokens.view(-1, rows * rows, self.card.get("frames_a_token", 1), channels)
        latents = frames.permute(0, 2, 3, 1).reshape(self.frames, channels, rows, rows)
        latents = latents / self.card["latent_scaling"] + self.card["latent_shift"]
        (pictures,) = self.vae.decode(latents, return_dict=False)
        scaled = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        whole = scaled.permute(0, 2, 3, 1)
        return whole if self.frames > 1 else whole[0]

    def file(self, tokens: torch.Tensor, side: int) -> bytes:
        """The finished PNG or MP4."""
        pixels = self.decode(tokens, side).numpy()
        return encode_media(pixels.reshape(-1, side, side, 3), fps=self.card.get("fps", 0))[0]


def main() -> None:
    """Answers one line of JSON for each line of JSON."""
    reference = Reference.load(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
    guidance = float(reference.card["guidance"]["default"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        side, began_ns = asked["side"], steady_ns()
        tokens, step_us = reference.denoise(
            asked["prompt"], side, asked["seed"], asked["steps"], guidance
        )
        reference.file(tokens, side)
        whole_us = (steady_ns() - began_ns) // 1000
        print(json.dumps({"step_us": step_us, "whole_us": whole_us}), flush=True)


if __name__ == "__main__":
    main()
