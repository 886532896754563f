"""The reference sampler of hocket-emoji, plain and in full, and the contact sheets.

Whatever serves these weights must do exactly what `sample` does: the same noise from the seed,
the same two-row transformer call each step, the same scheduler step, the same decoding.
"""

import argparse
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image, ImageDraw

from gpuworker.models.word_text import WordTextEncoder
from tools.train_emoji.data import ROOT

ASSETS = ROOT / "gpuworker" / "assets" / "hocket-emoji"


@dataclass(frozen=True)
class Pipeline:
    """The components of the asset folder, in float32, and its card."""

    text_encoder: WordTextEncoder
    transformer: FluxTransformer2DModel
    vae: AutoencoderTiny
    card: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Pipeline":
        """Read the folder; weights are stored as float16 and computed in float32."""
        return cls(
            WordTextEncoder.from_pretrained(folder / "text_encoder").float().eval(),
            FluxTransformer2DModel.from_pretrained(folder / "transformer").float().eval(),
            AutoencoderTiny.from_pretrained(folder / "vae").float().eval(),
            json.loads((folder / "card.json").read_text()),
        )


@torch.inference_mode()
def sample(
    pipe: Pipeline,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompt: str,
    side: int,
    seed: int,
    steps: int,
    guidance: float,
) -> np.ndarray:
    """Draw one picture: uint8 RGB [side, side, 3]. The same arguments give the same picture."""
    card = pipe.card
    rows = columns = side // card["patch_px"]
    channels = pipe.vae.config.latent_channels

    # 1. Text. Row 0 is unconditional (the empty prompt), row 1 the prompt; both know the size.
    size_word = card["size_words"][f"{side}x{side}"]
    ids = [pipe.text_encoder.tokenize(f"{text} {size_word}") for text in ("", prompt)]
    embeds, pooled = pipe.text_encoder(torch.cat(ids))
    txt_ids = pipe.text_encoder.text_ids()

    # 2. Rotary positions of the image tokens: cell centres, the side being position_span.
    img_ids = torch.zeros(rows, columns, 3)
    img_ids[..., 1] = ((torch.arange(rows) + 0.5) * card["position_span"] / rows)[:, None]
    img_ids[..., 2] = ((torch.arange(columns) + 0.5) * card["position_span"] / columns)[None]
    img_ids = img_ids.reshape(-1, 3)

    # 3. Noise, drawn in the layout of the VAE's latents, then one token a latent pixel.
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((1, channels, rows, columns), generator=generator, dtype=torch.float32)
    tokens = noise.flatten(2).transpose(1, 2)

    # 4. Flow-match Euler steps with classifier-free guidance.
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        (velocity,) = pipe.transformer(
            hidden_states=torch.cat([tokens, tokens]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=timestep.expand(2) / 1000,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )
        plain, prompted = velocity.chunk(2)
        guided = plain + guidance * (prompted - plain)
        (tokens,) = scheduler.step(guided, timestep, tokens, return_dict=False)

    # 5. Decode: undo the latent scaling, then -1..1 to 0..255.
    latents = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    latents = latents / card["latent_scaling"] + card["latent_shift"]
    (picture,) = pipe.vae.decode(latents, return_dict=False)
    scaled = (picture[0].clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 0).numpy()


def sheet(pipe: Pipeline, cells: list[tuple[str, int]], columns: int, cell: int) -> Image.Image:
    """A contact sheet of (prompt, side), seeds counting up from 1, each labelled by its prompt.

    Sheet colours are rounded to multiples of 5, unseen, which halves the size of the PNG.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "scheduler")
    steps, guidance = pipe.card["steps"]["default"], pipe.card["guidance"]["default"]
    high = cell + 30
    whole = Image.new("RGB", (columns * (cell + 4), -(-len(cells) // columns) * high), "white")
    draw = ImageDraw.Draw(whole)
    for place, (prompt, side) in enumerate(cells):
        pixels = sample(pipe, scheduler, prompt, side, place + 1, steps, guidance)
        left, top = place % columns * (cell + 4), place // columns * high
        whole.paste(Image.fromarray(pixels), (left + (cell - side) // 2, top + cell - side))
        label = "\n".join(textwrap.wrap(prompt, cell // 6))
        draw.multiline_text((left + 2, top + cell + 1), label, fill="black", spacing=1)
    return whole.point(lambda value: (value + 2) // 5 * 5)


def main() -> None:
    """Draw the two sheets of the documentation, or one quick sheet of every n-th thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ASSETS)
    parser.add_argument("--quick", type=int, help="only every n-th thing, to --out")
    parser.add_argument("--sizes-only", action="store_true", help="only the sheet of sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.load(args.folder)
    text = pipe.text_encoder
    count, shades = len(text.config.things), len(text.config.colours)
    # Every second one on the default background, the rest over all colours in turn.
    rows = [(thing, thing // 2 % shades if thing % 2 else 0) for thing in range(1, count + 1)]
    prompts = [text.phrase(*row) for row in rows]
    if args.quick:
        sheet(pipe, [(text, 128) for text in prompts[:: args.quick]], 12, 128).save(
            args.out, optimize=True
        )
        return
    if not args.sizes_only:
        every = sheet(pipe, [(text, 128) for text in prompts], 12, 128)
        every.save(args.out / "emoji-128.png", optimize=True)
    chosen = ["a fox", "a rocket on a black background", "a birthday cake on a pink background",
              "an owl on a green background", "coffee", "a house on a blue background"]  # fmt: skip
    bands = [
        sheet(pipe, [(prompt, side) for prompt in chosen], len(chosen), max(side, 128))
        for side in (64, 128, 256)
    ]
    sizes = Image.new("RGB", (bands[-1].width, sum(band.height for band in bands)), "white")
    for place, band in enumerate(bands):
        sizes.paste(band, (0, sum(above.height for above in bands[:place])))
    sizes.save(args.out / "emoji-sizes.png", optimize=True)


if __name__ == "__main__":
    main()
