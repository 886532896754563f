"""What callers want, and how they behave: drawn by the seed."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from hocket.client import request
from hocket.v1.generation_pb2 import GenerateRequest

PATIENT = "patient"  # follows to the end, through whatever gateway answers
RIDER = "rider"  # the same, and leaves the looking for gateways to the client
OPERATION = "operation"  # CreateGeneration, later the operation's end and its media
DETACHED = "detached"  # goes after the acceptance, comes back later for the result
QUITTER = "quitter"  # hangs up in the middle
CANCELLER = "canceller"  # calls Cancel in the middle
_BEHAVIOURS = (
    *(PATIENT,) * 8,
    *(RIDER,) * 4,
    *(DETACHED, OPERATION) * 2,
    *(QUITTER, CANCELLER) * 2,
)
TWO_PASSES, MADE_OVER = "two-pass", "img2img"  # shipped workflows
PICTURES, CLIPS = "hocket-emoji", "hocket-emoji-motion"
TENANT = "chaos"
_PROMPTS = ("a fox on a green background", "a red apple", "a sleeping cat", "a lighthouse at night")


@dataclass(frozen=True)
class MediaWish:
    """One thing to make. Equal wishes give equal files."""

    name: str
    model: str
    prompt: str
    side: int
    frames: int
    steps: int
    seed: int
    workflow: str = ""  # a registered one's name; empty: the model's own chain
    picture: bool = False  # it takes the uploaded picture

    def asked(
        self, key: str, *, detached: bool = False, deadline_s: float = 0.0, uploaded: str = ""
    ) -> GenerateRequest:
        """The call, by which a caller finds its request again: the same key, the same wish.
        `uploaded`: what the store of inputs calls the picture, where the wish takes one.
        """
        return request(
            self.prompt,
            model=self.model,
            shape=(self.side, self.side),
            frames=self.frames,
            steps=self.steps,
            seed=self.seed,
            idempotency_key=key,
            detached=detached,
            deadline_s=deadline_s,
            tenant=TENANT,
            workflow=self.workflow,
            inputs={"image": uploaded} if self.picture else {},
        )


@dataclass(frozen=True)
class PlannedCall:
    """One caller's errand."""

    number: int
    key: str
    wish: MediaWish
    behaviour: str
    gateway: float  # [0, 1): through which of them it begins
    patience_s: float  # after which a quitter hangs up, a canceller cancels, a detached one returns
    deadline_s: float  # 0: none


def catalogue(sizes: tuple[int, int], steps: int) -> tuple[MediaWish, ...]:
    """Pictures of two sizes, clips, and pictures by workflows, each with its own seed."""
    small, large = sizes
    found = []
    for number, prompt in enumerate(_PROMPTS):
        found.append(MediaWish(f"p{small}-{number}", PICTURES, prompt, small, 1, 2 * steps, number))
        found.append(
            MediaWish(f"p{large}-{number}", PICTURES, prompt, large, 1, steps, 50 + number)
        )
    for number in range(2):
        prompt = f"{_PROMPTS[number]}, moving"
        found.append(MediaWish(f"clip-{number}", CLIPS, prompt, small, 16, steps, 90 + number))
    for number in range(2):
        prompt, twice = _PROMPTS[number], 20 + number
        found += [
            MediaWish(f"twice-{number}", PICTURES, prompt, large, 1, steps, twice, TWO_PASSES),
            MediaWish(f"over-{number}", PICTURES, prompt, large, 1, steps, twice, MADE_OVER, True),
        ]
    return tuple(found)


@cache
def uploaded_picture() -> bytes:
    """The picture that callers bring: smooth colours, and of no size that a model serves."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    kept = io.BytesIO()
    Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC).save(kept, "PNG")
    return kept.getvalue()


class Errands:
    """An endless row of calls; the same seed gives the same row."""

    def __init__(self, seed: int, wishes: tuple[MediaWish, ...]) -> None:
        self._seed, self._wishes = seed, wishes
        self._dice = random.Random(f"errands-{seed}")
        self._number = 0

    def next(self) -> PlannedCall:
        dice, number = self._dice, self._number
        self._number += 1
        return PlannedCall(
            number=number,
            key=f"chaos-{self._seed}-{number}",
            wish=dice.choice(self._wishes),
            behaviour=dice.choice(_BEHAVIOURS),
            gateway=dice.random(),
            patience_s=dice.uniform(0.2, 4.0),
            deadline_s=dice.choice((0.0, 0.0, 30.0)),
        )
