"""Draw every clip and encode its frames once: the transformer then trains on latents alone."""

import argparse

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny

from tools.train_emoji.data import WORK, background, compose, icons
from tools.train_emoji.model import LATENT_CHANNELS, PATCH_PX
from tools.train_emoji.motion import FRAMES, MOTIONS, MOVED, SOURCE_PX, pose, posed
from tools.train_emoji.parallel import join
from tools.train_emoji.sample import ASSETS
from tools.train_emoji.vocabulary import COLOURS, THINGS

# Colours drawn of each thing and motion; the larger the picture, the less there is time for.
SHADES = {64: len(COLOURS), 128: 3}


def shades(thing: int, motion: int, side: int) -> list[int]:
    """The colour rows drawn of that thing and motion: always the unnamed one, others in turn."""
    named = len(COLOURS) - 1
    first = 5 * thing + 3 * motion
    return [0] + [1 + (first + step) % named for step in range(SHADES[side] - 1)]


def encoded(vae: AutoencoderTiny, frames: list[np.ndarray], rows: list[int]) -> np.ndarray:
    """float16 latents [colour, frame, C, rows, columns] of RGBA frames over each of the colours."""
    flat = np.stack([compose(np.stack(frames), background(row)) for row in rows])
    pictures = torch.from_numpy(flat).flatten(0, 1).permute(0, 3, 1, 2)
    parts = []
    for part in pictures.split(32):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encoder(part.contiguous(memory_format=torch.channels_last)).half())
    return torch.cat(parts).unflatten(0, (len(rows), len(frames))).numpy()


@torch.inference_mode()
def main() -> None:
    """Encode the sizes named on the command line, each rank its share of the things."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sides", nargs="*", type=int, default=list(SHADES))
    args = parser.parse_args()
    rank = join()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    vae = AutoencoderTiny.from_pretrained(ASSETS / "vae").float()
    vae = vae.to(memory_format=torch.channels_last)
    drawn = icons()[str(SOURCE_PX)][0]
    names = [thing.name for thing in THINGS]
    for side in args.sides:
        cells = side // PATCH_PX
        shape = (len(MOVED), len(MOTIONS), SHADES[side], FRAMES, LATENT_CHANNELS, cells, cells)
        path = WORK / f"motion-{side}.npy"
        if rank == 0:
            np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
        if ranks > 1:
            dist.barrier()
        stored = np.load(path, mmap_mode="r+")
        for thing in range(rank, len(MOVED), ranks):
            icon = drawn[names.index(MOVED[thing])]
            for number, motion in enumerate(MOTIONS):
                frames = [posed(icon, pose(motion, frame), side) for frame in range(FRAMES)]
                stored[thing, number] = encoded(vae, frames, shades(thing, number, side))
        stored.flush()


if __name__ == "__main__":
    main()
