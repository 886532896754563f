"""How near the model's clips come to the drawn ones: PSNR, by steps and guidance.

A clip is determined by its prompt, up to the model's errors, so that a figure says something here.
The clips drawn anew by the autoencoder alone are the ceiling.
"""

import argparse

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tools.train_emoji.data import background, compose, icons
from tools.train_emoji.motion import FRAMES, MOTIONS, MOVED, SOURCE_PX, pose, posed
from tools.train_emoji.motion_sample import MOTION_ASSETS, decode, denoise
from tools.train_emoji.sample import Pipeline
from tools.train_emoji.vocabulary import THINGS


def drawn(thing: int, motion: int, colour: int, side: int) -> np.ndarray:
    """The clip as training drew it: float32 [FRAMES, side, side, 3] in -1..1."""
    names = [known.name for known in THINGS]
    icon = icons()[str(SOURCE_PX)][0][names.index(MOVED[thing])]
    path = list(MOTIONS)[motion]
    frames = [posed(icon, pose(path, frame), side) for frame in range(FRAMES)]
    return compose(np.stack(frames), background(colour))


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of float pictures in -1..1, in decibels."""
    return float(10 * np.log10(4 / np.square(ours - theirs).mean()))


def main() -> None:
    """Print one line for each setting: mean PSNR over the clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--settings", nargs="+", default=["16:1.5"], help="steps:guidance")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.load(MOTION_ASSETS)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MOTION_ASSETS / "scheduler")
    rows = [(11 * n % len(MOVED), n % len(MOTIONS), 5 * n % 12) for n in range(args.clips)]
    truth = [drawn(*row, args.side) for row in rows]
    with torch.inference_mode():
        again = [
            pipe.vae(torch.from_numpy(clip).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
            for clip in truth
        ]
    ceiling = [psnr(a.clamp(-1, 1).numpy(), b) for a, b in zip(again, truth, strict=True)]
    print(f"autoencoder alone: {np.mean(ceiling):.1f} dB", flush=True)
    for setting in args.settings:
        steps, guidance = int(setting.split(":")[0]), float(setting.split(":")[1])
        found = []
        for seed, ((thing, motion, colour), clip) in enumerate(zip(rows, truth, strict=True)):
            prompt = pipe.text_encoder.phrase(thing + 1, colour, motion + 1)
            tokens = denoise(pipe, scheduler, prompt, args.side, seed, steps, guidance)
            pixels = decode(pipe, tokens, args.side).numpy()
            found.append(psnr(pixels / np.float32(127.5) - 1, clip))
        each = " ".join(f"{value:.1f}" for value in found)
        print(f"{steps} steps, guidance {guidance}: {np.mean(found):.1f} dB ({each})", flush=True)


if __name__ == "__main__":
    main()
