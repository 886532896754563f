"""Train the clip model by flow matching, from the picture model's weights, on cached latents.

A frame depends on thing, motion, colour and time alone, so most batches hold only a few of a clip's
times: more clips are seen for the same work. Batches of whole clips teach frames to agree.
A kind of batch is "<side>x<times>": "64x2" holds two of the eight times of clips of 64 px.
"""

import math
from typing import Any

import numpy as np
import torch

from tools.train_emoji.data import WORK
from tools.train_emoji.motion import MOTIONS, MOVED
from tools.train_emoji.motion_latents import shades
from tools.train_emoji.motion_model import (
    FRAMES_A_TOKEN,
    SIZE_WORDS,
    TIMES,
    MotionNetworks,
    clip_ids,
    pack,
    places,
)
from tools.train_emoji.parallel import join
from tools.train_emoji.train import DROPPED, PLAIN, Task, arguments, train

BATCH = {"64x2": 28, "64x4": 14, "64x8": 6, "128x1": 14, "128x2": 7, "128x8": 1}  # a rank's
NOISE_SPREAD = 1.2


class Clips:
    """The cached latents of one size: [thing, motion, shade, frame, C, rows, columns]."""

    def __init__(self, side: int) -> None:
        self._latents = np.load(WORK / f"motion-{side}.npy", mmap_mode="r")
        self._side = side

    def drawn(
        self, count: int, times: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents [count, frames, C, rows, columns] of those times, caption ids [count, 4])."""
        frames = (times.long()[:, None] * FRAMES_A_TOKEN + torch.arange(FRAMES_A_TOKEN)).flatten()
        clips, rows = [], []
        for _ in range(count):
            thing = int(torch.randint(len(MOVED), (), generator=generator))
            motion = int(torch.randint(len(MOTIONS), (), generator=generator))
            colours = shades(thing, motion, self._side)
            named = int(torch.randint(1, len(colours), (), generator=generator))
            chance = torch.rand(2, generator=generator)
            shade = 0 if chance[0] < PLAIN else named
            clips.append(self._latents[thing, motion, shade][frames.numpy()])
            kept = int(chance[1] >= DROPPED)
            size = list(SIZE_WORDS).index(self._side)
            rows.append([kept * (thing + 1), kept * colours[shade], size, kept * (motion + 1)])
        return torch.from_numpy(np.stack(clips)).float(), torch.tensor(rows)


def flow_loss(
    networks: MotionNetworks,
    clean: torch.Tensor,
    ids: torch.Tensor,
    times: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise - clean), more often at high noise."""
    rows, columns = clean.shape[-2:]
    count, tokens = len(clean), len(times) * rows * columns
    noise = torch.randn(clean.shape, generator=generator)
    # The more tokens show a clip, the more noise it takes to hide it.
    middle = 0.3 + 0.2 * math.log2(tokens / 64)
    sigma = torch.sigmoid(middle + NOISE_SPREAD * torch.randn(count, generator=generator))
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None, None])
    place = places(times, rows, columns).expand(count, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        embeds, pooled = networks.text(ids)
        (velocity,) = networks.transformer(
            hidden_states=torch.cat([pack(mixed), place], 2),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=clip_ids(times, rows, columns),
            txt_ids=networks.text.text_ids(),
            return_dict=False,
        )
    return (velocity.float() - pack(noise - clean)).square().mean()


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    """Attention as its formula stands: torch's own takes three times as long backwards here."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value


def clip_task(mix: str) -> Task:
    """Batches of every kind; sizes which the mix leaves out are not read."""
    wanted = [kind for kind, share in zip(BATCH, mix.split(","), strict=True) if float(share)]
    clips = {side: Clips(side) for side in {int(kind.split("x")[0]) for kind in wanted}}

    def loss(networks: MotionNetworks, kind: str, generator: torch.Generator) -> torch.Tensor:
        side, count = (int(part) for part in kind.split("x"))
        times = torch.randperm(TIMES, generator=generator)[:count].sort().values.float()
        clean, ids = clips[side].drawn(BATCH[kind], times, generator)
        return flow_loss(networks, clean, ids, times, generator)

    return Task(list(BATCH), loss)


def main() -> None:
    """Run one phase; README.md has those of the shipped weights."""
    args = arguments(__doc__, WORK / "motion.pt", "0.7,0,0.3,0,0,0")
    rank = join()
    torch.nn.functional.scaled_dot_product_attention = written_out
    torch.manual_seed(args.seed)
    train(args, rank, MotionNetworks(), clip_task(args.mix))


if __name__ == "__main__":
    main()
