"""Fetch the Noto Emoji vectors (Apache-2.0) and render them crisply at each of the three sizes.

Run first. Needs npm and `pip install resvg-py`, which nothing else here does.
"""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import resvg_py
from PIL import Image

from tools.train_emoji.data import PLACEMENTS, WORK
from tools.train_emoji.vocabulary import SIZE_WORDS, THINGS

ICON_PACKAGE = "@iconify-json/noto@1.2.9"


def fetch() -> dict[str, str]:
    """Download the icon set once and return the SVG body of every icon of the vocabulary."""
    WORK.mkdir(exist_ok=True)
    archives = sorted(WORK.glob("iconify-json-noto-*.tgz"))
    if not archives:
        subprocess.run(["npm", "pack", ICON_PACKAGE], cwd=WORK, check=True, capture_output=True)
        archives = sorted(WORK.glob("iconify-json-noto-*.tgz"))
    with tarfile.open(archives[-1]) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        stored = json.load(member)["icons"]
    return {thing.icon: stored[thing.icon]["body"] for thing in THINGS}


def render(body: str, side: int, placement: tuple[float, float, float]) -> np.ndarray:
    """Draw one icon (a 128-unit SVG body) at its placement: uint8 RGBA [side, side, 4]."""
    right, down, width = placement
    left, top = 64 + 128 * right - 64 * width, 64 + 128 * down - 64 * width
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="0 0 128 128">'
        f'<g transform="translate({left} {top}) scale({width})">{body}</g></svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def main() -> None:
    """Fetch, render every thing at every size and placement, and store the lot."""
    bodies = fetch()
    rendered = {
        str(side): np.stack(
            [
                np.stack([render(bodies[thing.icon], side, place) for thing in THINGS])
                for place in PLACEMENTS
            ]
        )
        for side in SIZE_WORDS
    }
    np.savez(WORK / "icons.npz", allow_pickle=False, **rendered)
    print(f"{len(THINGS)} things, {len(PLACEMENTS)} placements", file=sys.stderr)


if __name__ == "__main__":
    main()
