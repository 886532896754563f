"""Encode every training picture once: the transformer then trains on latents alone."""

import sys

import numpy as np
import torch
from diffusers import AutoencoderTiny

from tools.train_emoji.data import WORK, background, compose, icons
from tools.train_emoji.vocabulary import COLOURS, SIZE_WORDS


def encode_all(vae: AutoencoderTiny, rgba: np.ndarray) -> torch.Tensor:
    """float16 latents [placement, thing, colour, C, rows, columns] of one size's icons."""
    places = []
    for place in rgba:
        things = []
        for icon in place:
            flat = [compose(icon, background(row)) for row in range(len(COLOURS))]
            pictures = torch.from_numpy(np.stack(flat)).permute(0, 3, 1, 2)
            with torch.autocast("cpu", torch.bfloat16):
                things.append(vae.encoder(pictures.contiguous(memory_format=torch.channels_last)))
        places.append(torch.stack(things).half())
    return torch.stack(places)


@torch.inference_mode()
def main() -> None:
    """Encode the sizes named on the command line (all by default)."""
    torch.set_num_threads(1)
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(memory_format=torch.channels_last)
    pictures = icons()
    for side in sys.argv[1:] or [str(side) for side in SIZE_WORDS]:
        latents = encode_all(vae, pictures[side])
        torch.save(latents, WORK / f"latents-{side}.pt")
        spread = latents.float().std()
        print(f"{side}: {tuple(latents.shape)} mean {latents.float().mean():.3f} std {spread:.3f}")


if __name__ == "__main__":
    main()
