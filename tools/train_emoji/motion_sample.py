"""The reference sampler of hocket-emoji-motion, plain and in full, and its contact sheets.

Whatever serves these weights must do exactly what `denoise` and `decode` do.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw

from tools.train_emoji.data import ROOT
from tools.train_emoji.model import LATENT_CHANNELS
from tools.train_emoji.motion import FRAMES
from tools.train_emoji.motion_model import FRAMES_A_TOKEN, clip_ids, pack, places, unpack
from tools.train_emoji.sample import Pipeline

MOTION_ASSETS = ROOT / "gpuworker" / "assets" / "hocket-emoji-motion"


@torch.inference_mode()
def denoise(
    pipe: Pipeline,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompt: str,
    side: int,
    seed: int,
    steps: int,
    guidance: float,
    frames: int = FRAMES,
) -> torch.Tensor:
    """The final tokens [1, times * rows * columns, 32] of a clip, or of its first frames."""
    card = pipe.card
    rows = columns = side // card["patch_px"]

    # 1. Text. Row 0 is unconditional (the empty prompt), row 1 the prompt; both know the size.
    size_word = card["size_words"][f"{side}x{side}"]
    ids = [pipe.text_encoder.tokenize(f"{text} {size_word}") for text in ("", prompt)]
    embeds, pooled = pipe.text_encoder(torch.cat(ids))

    # 2. Noise, drawn in the layout of the latents of the clip's frames, then two frames a token.
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, frames, LATENT_CHANNELS, rows, columns)
    tokens = pack(torch.randn(shape, generator=generator, dtype=torch.float32))

    # 3. Flow-match Euler steps with classifier-free guidance; the last channels of a token's input
    # say where and when it is.
    times = torch.arange(frames // FRAMES_A_TOKEN).float()
    place = places(times, rows, columns).expand(2, -1, -1)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        (velocity,) = pipe.transformer(
            hidden_states=torch.cat([torch.cat([tokens, tokens]), place], 2),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=timestep.expand(2) / 1000,
            img_ids=clip_ids(times, rows, columns),
            txt_ids=pipe.text_encoder.text_ids(),
            return_dict=False,
        )
        plain, prompted = velocity.chunk(2)
        guided = plain + guidance * (prompted - plain)
        (tokens,) = scheduler.step(guided, timestep, tokens, return_dict=False)
    return tokens


@torch.inference_mode()
def decode(pipe: Pipeline, tokens: torch.Tensor, side: int) -> torch.Tensor:
    """The clip of final tokens: uint8 RGB [frames, side, side, 3]."""
    rows = columns = side // pipe.card["patch_px"]
    (frames,) = unpack(tokens, rows, columns)
    frames = frames / pipe.card["latent_scaling"] + pipe.card["latent_shift"]
    (pictures,) = pipe.vae.decode(frames, return_dict=False)
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)


def strip(pipe: Pipeline, clips: list[tuple[str, int]], side: int, shown: range) -> Image.Image:
    """A contact sheet of (prompt, seed): a row each, a column for each frame that is shown."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MOTION_ASSETS / "scheduler")
    steps, guidance = pipe.card["steps"]["default"], pipe.card["guidance"]["default"]
    margin, high = 150, side + 4
    whole = Image.new("RGB", (margin + len(shown) * side, len(clips) * high), "white")
    draw = ImageDraw.Draw(whole)
    for row, (prompt, seed) in enumerate(clips):
        clip = decode(pipe, denoise(pipe, scheduler, prompt, side, seed, steps, guidance), side)
        label = "\n".join(textwrap.wrap(prompt, margin // 6))
        draw.multiline_text((4, row * high + side // 2 - 12), label, fill="black", spacing=1)
        for column, frame in enumerate(shown):
            picture = Image.fromarray(clip[frame].numpy())
            whole.paste(picture, (margin + column * side, row * high))
    return whole.point(lambda value: (value + 2) // 5 * 5)


def everything(pipe: Pipeline) -> list[str]:
    """Every thing once, the motions in turn, half of them on a named colour."""
    text = pipe.text_encoder
    shades, motions = len(text.config.colours), len(text.config.motions)
    return [
        text.phrase(thing, thing // 2 % shades if thing % 2 else 0, 1 + thing % motions)
        for thing in range(1, len(text.config.things) + 1)
    ]


def main() -> None:
    """Draw a sheet of the card's examples, of the prompts named, or of every thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("--everything", action="store_true", help="every thing once")
    parser.add_argument("--folder", type=Path, default=MOTION_ASSETS)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--every", type=int, default=2, help="show every n-th frame")
    parser.add_argument("--columns", type=int, default=1, help="of clips")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.load(args.folder)
    prompts = args.prompts or (everything(pipe) if args.everything else pipe.card["examples"])
    clips = [(prompt, seed) for seed, prompt in enumerate(prompts, start=1)]
    tall = -(-len(clips) // args.columns)
    shown = range(args.every // 2, FRAMES, args.every)
    bands = [
        strip(pipe, clips[first : first + tall], args.side, shown)
        for first in range(0, len(clips), tall)
    ]
    sheet = Image.new("RGB", (sum(band.width for band in bands), bands[0].height), "white")
    for place, band in enumerate(bands):
        sheet.paste(band, (place * bands[0].width, 0))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
