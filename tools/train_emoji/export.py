"""Write the asset folder that the product serves from the last checkpoint's averaged weights."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny

from tools.train_emoji.data import WORK
from tools.train_emoji.model import PATCH_PX, POSITION_SPAN, new_scheduler
from tools.train_emoji.sample import ASSETS
from tools.train_emoji.train import Networks
from tools.train_emoji.vocabulary import SIZE_WORDS

INDEX = {
    "_class_name": "HocketEmojiPipeline",
    "_diffusers_version": diffusers.__version__,
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
    "text_encoder": ["gpuworker.models.word_text", "WordTextEncoder"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}

CARD: dict[str, Any] = {
    "name": "hocket-emoji",
    "family": "flux",
    "modality": "image",
    "sizes": [[side, side] for side in SIZE_WORDS],
    "default_size": [128, 128],
    "steps": {"min": 1, "max": 100, "default": 20},
    "guidance": {"kind": "cfg", "default": 1.8, "min": 1.0, "max": 4.0},
    "patch_px": PATCH_PX,
    "packing": 1,
    "position_span": POSITION_SPAN,
    "latent_scaling": 1.0,
    "latent_shift": 0.0,
    "size_words": {f"{side}x{side}": word for side, word in SIZE_WORDS.items()},
}


def export(
    networks: Any, vae: AutoencoderTiny, folder: Path, index: dict[str, Any], card: dict[str, Any]
) -> None:
    """Write every component as float16 safetensors, the index and the card.

    Written beside the folder first and moved into it piece by piece, since someone may be
    serving from it; README.md and NOTICE there are kept.
    """
    fresh = WORK / "export"
    shutil.rmtree(fresh, ignore_errors=True)
    networks.transformer.half().save_pretrained(fresh / "transformer")
    networks.text.half().save_pretrained(fresh / "text_encoder")
    vae.half().save_pretrained(fresh / "vae")
    for key in ("block_out_channels", "_name_or_path"):
        _drop_unread_key(fresh / "vae" / "config.json", key)
    new_scheduler().save_pretrained(fresh / "scheduler")
    (fresh / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (fresh / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    for path in sorted(fresh.rglob("*")):
        target = folder / path.relative_to(fresh)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def _drop_unread_key(path: Path, key: str) -> None:
    """AutoencoderTiny writes a config key which it then warns about when it reads it."""
    config = json.loads(path.read_text())
    config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Export the checkpoint, or untrained networks when there is none yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=WORK / "model.pt")
    parser.add_argument("--folder", type=Path, default=ASSETS)
    args = parser.parse_args()
    networks = Networks()
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=False)
        networks.load_state_dict(state["ema"])
        print(f"step {state['step']}, {state['cpu_s']:.0f} CPU-seconds a rank")
    export(networks, AutoencoderTiny.from_pretrained(WORK / "vae"), args.folder, INDEX, CARD)


if __name__ == "__main__":
    main()
