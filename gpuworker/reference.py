"""The plain `diffusers` loop for the embedded model: no card, no engine, no groups, no mesh.

What the mesh's latents are compared with in tests and its times in `make bench`. It shares nothing
with `models/flux.py` on purpose, so that a mistake there cannot hide here.

`python -m gpuworker.reference` reads lines of {"prompt", "side", "seed", "steps"} and answers each
with {"step_us": [...]}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from gpuworker.models.word_text import WordTextEncoder
from hocket.clock import steady_ns

_PLAIN = {"low_cpu_mem_usage": False}  # the other way needs accelerate, and says so
ASSETS = Path(__file__).parent / "assets" / "hocket-emoji"


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
        rows, span = side // self.card["patch_px"], self.card["position_span"]
        size_word = self.card["size_words"][f"{side}x{side}"]
        ids = [self.text_encoder.tokenize(f"{text} {size_word}") for text in ("", prompt)]
        embeds, pooled = self.text_encoder(torch.cat(ids))
        places = (torch.arange(rows) + 0.5) * span / rows
        image_ids = torch.zeros(rows, rows, 3)
        image_ids[..., 1], image_ids[..., 2] = places[:, None], places[None]
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.vae.config.latent_channels, rows, rows)
        tokens = torch.randn(shape, generator=generator).flatten(2).transpose(1, 2)
        self.scheduler.set_timesteps(steps)
        took_us = []
        for timestep in self.scheduler.timesteps[:stop_after]:
            began_ns = steady_ns()
            (velocity,) = self.transformer(
                hidden_states=torch.cat([tokens, tokens]),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=timestep.expand(2) / 1000,
                img_ids=image_ids.reshape(-1, 3),
                txt_ids=self.text_encoder.text_ids(),
                return_dict=False,
            )
            plain, prompted = velocity.chunk(2)
            guided = plain + guidance * (prompted - plain)
            (tokens,) = self.scheduler.step(guided, timestep, tokens, return_dict=False)
            took_us.append((steady_ns() - began_ns) // 1000)
        return tokens, took_us

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        """uint8 RGB [side, side, 3]."""
        rows = side // self.card["patch_px"]
        latents = tokens.transpose(1, 2).unflatten(2, (rows, rows))
        latents = latents / self.card["latent_scaling"] + self.card["latent_shift"]
        (picture,) = self.vae.decode(latents, return_dict=False)
        scaled = (picture[0].clamp(-1, 1) + 1) * 127.5
        return scaled.round().to(torch.uint8).permute(1, 2, 0)


def main() -> None:
    """Answers one line of JSON for each line of JSON."""
    reference = Reference.load()
    guidance = float(reference.card["guidance"]["default"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        _, step_us = reference.denoise(
            asked["prompt"], asked["side"], asked["seed"], asked["steps"], guidance
        )
        print(json.dumps({"step_us": step_us}), flush=True)


if __name__ == "__main__":
    main()
