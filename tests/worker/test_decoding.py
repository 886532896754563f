"""Decoding in tiles: when it is done, what it bounds, how far it is from decoding the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from gpuworker.models.card import ModelCard, to_frames
from gpuworker.models.loading import load_card
from gpuworker.state import LatentState
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import CPU

WAN_SIZE = {"width": 448, "height": 320, "frames": 5}  # tiles of 256 px, 64 of them shared
FLUX_SIZE = {"width": 224, "height": 160}
FLUX_TILE_PX = 128  # a quarter of it shared
# Mean and 99th percentile of the difference, in levels of 255. Random weights are the worse case:
# the Flux decoder normalises over what it sees, and a tile of noise is not like its neighbour.
WAN_TOLERANCE = (0.03, 1)
FLUX_TOLERANCE = (1.5, 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def card_that_tiles(reference: Reference, folder: Path, over_px: int) -> ModelCard:
    """The same model with another threshold in its card.json, and small tiles for Flux."""
    shutil.copytree(reference.folder, folder)
    facts = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**facts, "tiled_over_px": over_px}))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    if "sample_size" in vae:
        vae["sample_size"] = FLUX_TILE_PX
        (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return load_card(str(folder), CPU, torch.float32)


def decoders_inputs(card: ModelCard, state: LatentState) -> tuple[NDArray[np.uint8], int]:
    """The frames of a state, and the area of the largest latent that the decoder saw at once."""
    seen: list[int] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        seen.append(inputs[0].shape[-1] * inputs[0].shape[-2])

    hook = card._parts["vae"].decoder.register_forward_hook(note)  # type: ignore[attr-defined]
    frames = card.decode(state)
    hook.remove()
    return frames, max(seen)


def differences(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> tuple[float, float]:
    assert ours.shape == theirs.shape
    levels = np.abs(ours.astype(int) - theirs.astype(int))
    return float(levels.mean()), float(np.percentile(levels, 99))


@pytest.mark.parametrize(
    ("family", "size", "tile_area", "tolerance"),
    [
        ("wan", WAN_SIZE, 32 * 32, WAN_TOLERANCE),
        ("flux", FLUX_SIZE, 64 * 64, FLUX_TOLERANCE),
    ],
)
def test_tiles_bound_the_decoder_and_are_close_to_the_whole(
    family: str,
    size: dict[str, int],
    tile_area: int,
    tolerance: tuple[float, float],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    reference: Reference = request.getfixturevalue(family)
    area_px = size["width"] * size["height"]
    whole = card_that_tiles(reference, tmp_path / "whole", over_px=area_px)
    tiled = card_that_tiles(reference, tmp_path / "tiled", over_px=area_px - 1)
    state = whole.encode(**{**reference.settings, **size})
    theirs, whole_area = decoders_inputs(whole, state)
    ours, largest = decoders_inputs(tiled, state)
    assert whole_area > tile_area >= largest, "a tile at once, not the picture"
    found = differences(ours, theirs)
    assert 0 < found[0] <= tolerance[0] and found[1] <= tolerance[1], found
    mirrored = differences(ours[:, :, ::-1], theirs)
    assert mirrored[0] > tolerance[0] or mirrored[1] > tolerance[1], "the planted negative"


def test_at_the_threshold_it_is_the_stock_decoder_to_the_bit(
    wan: Reference, tmp_path: Path
) -> None:
    """Also after a request above it: tiling is switched on in the model that all requests share."""
    small, large = {"width": 288, "height": 272}, {"width": 288, "height": 288}
    card = card_that_tiles(wan, tmp_path / "wan", over_px=288 * 272)
    vae: Any = card._parts["vae"]  # type: ignore[attr-defined]
    card.decode(card.encode(**{**wan.settings, **large, "frames": 1}))
    assert vae.use_tiling
    state = card.encode(**{**wan.settings, **small, "frames": 1})
    ours = card.decode(state)
    vae.disable_tiling()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.inference_mode():
        stock = vae.decode(state.tensors["latents"] / std + mean, return_dict=False)[0]
    assert np.array_equal(ours, to_frames(stock[0].transpose(0, 1)))
