"""Training pictures: icons as render.py left them in `.train/`, laid over flat colours.

Every picture is one icon over one colour, in one of a few placements. The placements are the same
for all things on purpose: shared, they are learned once rather than once for each thing.
"""

from pathlib import Path

import numpy as np

from tools.train_emoji.vocabulary import COLOURS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".train"

# (shift right, shift down, icon width), as fractions of the picture's side.
PLACEMENTS: tuple[tuple[float, float, float], ...] = (
    (0.0, 0.0, 0.86),
    (-0.02, 0.015, 0.86),
    (0.02, -0.015, 0.86),
    (0.0, 0.02, 0.80),
    (0.0, -0.01, 0.92),
)


def icons() -> dict[str, np.ndarray]:
    """Rendered icons by size ("64", "128", "256"): uint8 RGBA [placement, thing, side, side, 4]."""
    with np.load(WORK / "icons.npz") as stored:
        return {side: stored[side] for side in stored.files}


def compose(rgba: np.ndarray, colour: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    """Lay RGBA icons [..., side, side, 4] over a flat sRGB colour: float32 [..., 3] in -1..1."""
    alpha = rgba[..., 3:].astype(np.float32) / 255.0
    flat = np.asarray(colour, np.float32)
    return (rgba[..., :3] * alpha + flat * (1.0 - alpha)) / 127.5 - 1.0


def background(colour_row: int) -> tuple[int, int, int]:
    """The sRGB value of the colour in that row of the vocabulary."""
    return list(COLOURS.values())[colour_row]
