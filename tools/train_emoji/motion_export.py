"""Write the asset folder of the clip model from the last checkpoint's averaged weights."""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from tools.train_emoji.data import WORK
from tools.train_emoji.export import CARD, INDEX, export
from tools.train_emoji.motion import FRAMES
from tools.train_emoji.motion_model import FRAMES_A_TOKEN, SIZE_WORDS, TIME_SPAN, MotionNetworks
from tools.train_emoji.motion_sample import MOTION_ASSETS
from tools.train_emoji.sample import ASSETS

MOTION_INDEX = INDEX | {"_class_name": "HocketEmojiMotionPipeline"}
MOTION_CARD: dict[str, Any] = CARD | {
    "name": "hocket-emoji-motion",
    "modality": "video",
    "sizes": [[side, side] for side in SIZE_WORDS],
    "default_size": [64, 64],
    "frames": FRAMES,
    "frames_a_token": FRAMES_A_TOKEN,
    "time_span": TIME_SPAN,
    "fps": 8,
    "guidance": {"kind": "cfg", "default": 1.5, "min": 1.0, "max": 4.0},
    "steps": {"min": 1, "max": 100, "default": 12},
    "size_words": {f"{side}x{side}": word for side, word in SIZE_WORDS.items()},
    "examples": [
        "a fox bouncing",
        "a rocket flying on a blue background",
        "a star spinning on a purple background",
        "a cat growing on a pink background",
        "a penguin swinging on a green background",
        "a red apple falling",
        "a soccer ball bouncing on a green background",
        "a bee flying on a yellow background",
        "a robot spinning on a white background",
        "a balloon growing",
        "a moon swinging on a black background",
        "a strawberry falling on a gray background",
    ],
}


def main() -> None:
    """Export the checkpoint, or networks untrained in motion when there is none yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=WORK / "motion.pt")
    parser.add_argument("--folder", type=Path, default=MOTION_ASSETS)
    args = parser.parse_args()
    networks = MotionNetworks()
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=False)
        networks.load_state_dict(state["ema"])
        print(f"step {state['step']}, {state['cpu_s']:.0f} CPU-seconds a rank")
    vae = AutoencoderTiny.from_pretrained(ASSETS / "vae")
    export(networks, vae, args.folder, MOTION_INDEX, MOTION_CARD)


if __name__ == "__main__":
    main()
