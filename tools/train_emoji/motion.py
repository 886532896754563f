"""The motions of hocket-emoji-motion, and how a clip of one is drawn from an icon.

A clip is sixteen frames of one icon moving over a flat colour. A motion is one path for all things
and all seeds, on purpose: a frame then depends on nothing but thing, motion, colour and time, which
a small model can learn well. Each path was chosen to be told from the others at a glance.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

FRAMES = 16
SOURCE_PX = 256  # the rendered icons that clips are made from
_SOURCE_WIDTH = 0.86  # an icon's width there, as a share of the side (data.PLACEMENTS[0])

# Motion -> other words for it. The first one is drawn when a prompt names none.
MOTIONS: dict[str, tuple[str, ...]] = {
    "bouncing": ("bounce", "bounces", "jumping", "jump", "jumps", "hopping", "hop", "hops",
                 "leaping", "dancing", "dances"),
    "spinning": ("spin", "spins", "turning", "turns", "rotating", "rotates", "twirling",
                 "whirling", "rolling", "flipping"),
    "flying": ("fly", "flies", "sliding", "slides", "driving", "drives", "moving", "moves",
               "running", "runs", "walking", "walks", "swimming", "swims", "sailing", "racing",
               "gliding", "passing", "crossing", "speeding", "going"),
    "growing": ("grow", "grows", "zooming", "expanding", "expands", "inflating", "approaching",
                "appearing", "swelling", "rising"),
    "swinging": ("swing", "swings", "swaying", "sways", "rocking", "rocks", "wobbling", "wobbles",
                 "waving", "shaking", "shakes", "dangling"),
    "falling": ("fall", "falls", "dropping", "drops", "sinking", "sinks", "tumbling", "raining",
                "landing", "descending"),
}  # fmt: skip

# The things that move: those of the picture model which keep their shape at half the size.
MOVED = (
    "cat", "dog", "fox", "bear", "panda", "koala", "tiger", "lion", "cow", "pig", "frog",
    "monkey", "rabbit", "unicorn", "chicken", "penguin", "owl", "duck", "butterfly", "bee",
    "ladybug", "tropical fish", "turtle", "whale", "elephant", "dinosaur", "red apple", "banana",
    "lemon", "cherries", "strawberry", "watermelon", "pineapple", "carrot", "mushroom", "pumpkin",
    "hamburger", "doughnut", "ice cream", "car", "bus", "airplane", "rocket", "helicopter",
    "sailboat", "sun", "moon", "star", "snowman", "fire", "pine tree", "sunflower", "planet",
    "earth", "house", "key", "balloon", "soccer ball", "basketball", "crown", "robot", "ghost",
    "smiley", "red heart",
)  # fmt: skip


class Pose(NamedTuple):
    """Where an icon is in one frame: fractions of the side, degrees clockwise.

    A negative `wide` mirrors it.
    """

    x: float
    y: float
    wide: float
    high: float
    tilt: float = 0.0


def pose(motion: str, frame: int) -> Pose:
    """The icon's pose in that frame of a clip."""
    return _PATHS[motion](frame)


def _bouncing(frame: int) -> Pose:
    """Two jumps a clip, squashed at the ground."""
    share = frame % 8 / 8
    height = 4 * share * (1 - share)
    squash = max(0.0, 1 - 3 * height)
    size, ground = 0.62, 0.95
    high = size * (1 - 0.28 * squash)
    return Pose(0.5, ground - 0.31 * height - high / 2, size * (1 + 0.16 * squash), high)


def _spinning(frame: int) -> Pose:
    """One turn about the upright axis, as a coin turns: the back is the mirror image."""
    facing = math.cos(2 * math.pi * frame / FRAMES)
    facing = math.copysign(max(abs(facing), 0.12), facing)
    return Pose(0.5, 0.5, 0.8 * facing, 0.8)


def _flying(frame: int) -> Pose:
    """In at the left edge, out at the right."""
    along = frame / (FRAMES - 1)
    return Pose(-0.12 + 1.24 * along, 0.5 - 0.05 * math.sin(2 * math.pi * along), 0.62, 0.62)


def _growing(frame: int) -> Pose:
    """From a fifth of the side to nearly all of it."""
    size = 0.2 + 0.74 * frame / (FRAMES - 1)
    return Pose(0.5, 0.5, size, size)


def _swinging(frame: int) -> Pose:
    """A pendulum hung from the top edge, one period a clip."""
    angle = 28 * math.sin(2 * math.pi * frame / FRAMES)
    arm = 0.45
    x = 0.5 - arm * math.sin(math.radians(angle))
    return Pose(x, arm * math.cos(math.radians(angle)), 0.66, 0.66, angle)


def _falling(frame: int) -> Pose:
    """In at the top, out at the bottom, faster and faster."""
    along = frame / (FRAMES - 1)
    return Pose(0.5, -0.14 + 1.28 * (0.45 * along + 0.55 * along * along), 0.62, 0.62)


_PATHS = {
    "bouncing": _bouncing,
    "spinning": _spinning,
    "flying": _flying,
    "growing": _growing,
    "swinging": _swinging,
    "falling": _falling,
}


def posed(icon: np.ndarray, at: Pose, side: int) -> np.ndarray:
    """Draw an RGBA icon [SOURCE_PX, SOURCE_PX, 4] in that pose: uint8 RGBA [side, side, 4].

    Drawn at SOURCE_PX with premultiplied alpha, then averaged down, so that edges are smooth.
    """
    premultiplied = icon.astype(np.float32)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    source = Image.fromarray(premultiplied.round().astype(np.uint8), "RGBA")
    shrunk = 2 if max(abs(at.wide), at.high) < 0.55 else 1
    source = source.reduce(shrunk)
    # From a drawn pixel back to the icon's: undo place, tilt and size, in this order.
    middle, cosine = source.width / 2, math.cos(math.radians(at.tilt))
    sine = math.sin(math.radians(at.tilt))
    across, down = _SOURCE_WIDTH / at.wide / shrunk, _SOURCE_WIDTH / at.high / shrunk
    a, b, d, e = across * cosine, across * sine, -down * sine, down * cosine
    x, y = at.x * SOURCE_PX, at.y * SOURCE_PX
    back = (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y)
    drawn = source.transform(
        (SOURCE_PX, SOURCE_PX), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
    )
    small = np.asarray(drawn.reduce(SOURCE_PX // side), np.float32)
    alpha = np.maximum(small[..., 3:], 1)
    colour = np.minimum(small[..., :3] * 255 / alpha, 255)
    return np.concatenate([colour, small[..., 3:]], -1).round().astype(np.uint8)
