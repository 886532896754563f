"""Decoding in tiles: when it is done, what it bounds, how far it is from decoding the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from gpuworker.loading import load_card
from gpuworker.memory.budget import ran_out
from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import ModelCard
from gpuworker.models.pictures import to_frames
from gpuworker.state import LatentState
from gpuworker.steps.decode import Decodes, decoded
from gpuworker.steps.pace import StepPace
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.test_pace import STEPS, Desk
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
    """Also after a request above it: the model that decodes in tiles is one that all share."""
    small, large = {"width": 288, "height": 272}, {"width": 288, "height": 288}
    card = card_that_tiles(wan, tmp_path / "wan", over_px=288 * 272)
    vae: Any = card._parts["vae"]  # type: ignore[attr-defined]
    card.decode(card.encode(**{**wan.settings, **large, "frames": 1}))
    assert not vae.use_tiling
    state = card.encode(**{**wan.settings, **small, "frames": 1})
    ours = card.decode(state)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.inference_mode():
        stock = vae.decode(state.tensors["latents"] / std + mean, return_dict=False)[0]
    assert np.array_equal(ours, to_frames(stock[0].transpose(0, 1)))


HUGE = 1 << 46  # bytes: more than the address space has room for
# Size of the job, and sides of the smallest tiles in latent pixels, largest tiles first.
STARVED: dict[str, tuple[dict[str, int], list[tuple[int, int]]]] = {
    "wan": (WAN_SIZE, [(32, 32), (16, 16), (8, 8)]),
    "flux": (FLUX_SIZE, [(64, 64), (32, 32), (16, 16)]),
    "qwen": ({"width": 320, "height": 288}, [(32, 32), (16, 16)]),
    "hunyuan": ({"width": 320, "height": 288, "frames": 5}, [(32, 32), (16, 16)]),
    "ltx": ({"width": 544, "height": 288, "frames": 25}, [(9, 16), (8, 8)]),
    "cogvideox": ({"width": 400, "height": 256, "frames": 9}, [(30, 45)]),
}


def card_for(family: str, folder: Path, request: pytest.FixtureRequest) -> tuple[ModelCard, Any]:
    """A card whose jobs have any size, and its decoder's own module."""
    reference: Reference = request.getfixturevalue(family)
    card = card_that_tiles(reference, folder / family, over_px=1 << 40)
    if family == "cogvideox":
        card.facts = replace(card.facts, sizes=())
    return card, card._parts["vae"]  # type: ignore[attr-defined]


@contextmanager
def starving(vae: Any, latents_max: int) -> Iterator[list[int]]:
    """Memory runs out, by torch's own error, where a decode sees more; gives what was granted."""
    seen: list[int] = []

    def ask(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        area = inputs[0].shape[-1] * inputs[0].shape[-2]
        if area > latents_max:
            torch.empty(HUGE, dtype=torch.uint8)
        seen.append(area)

    hook = vae.decoder.register_forward_pre_hook(ask)
    yield seen
    hook.remove()


def tiling_of(vae: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(vae).items() if k.startswith(("tile_", "use_"))}


@pytest.mark.parametrize(
    ("family", "tile"),
    [
        pytest.param(name, tile, marks=[pytest.mark.full] if tile != tiles[-1] else [])
        for name, (_, tiles) in STARVED.items()
        for tile in tiles
    ],
)
def test_a_decode_that_ran_out_of_memory_goes_on_in_smaller_tiles(
    family: str, tile: tuple[int, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    card, vae = card_for(family, tmp_path, request)
    size, _ = STARVED[family]
    reference: Reference = request.getfixturevalue(family)
    state = card.encode(**{**reference.settings, **size})
    whole, before = decoded(card, state, smaller=False).frames, tiling_of(vae)
    with starving(vae, tile[0] * tile[1]) as seen:
        with pytest.raises(RuntimeError) as first:
            decoded(card, state, smaller=False)
        assert ran_out(first.value) and not seen, "others make room before the picture changes"
        ours = decoded(card, state, smaller=True).frames
    assert max(seen) <= tile[0] * tile[1] and len(seen) > 1
    mean, _ = differences(ours, whole)
    assert 0 < 2 * mean < differences(ours[:, :, ::-1], whole)[0], "far nearer than mirrored"
    assert tiling_of(vae) == before, "the next request has the whole decoder again"
    assert np.array_equal(decoded(card, state, smaller=True).frames, whole), "and to the bit"


def test_with_no_smaller_tile_it_fails_as_before(
    wan: Reference, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    card, vae = card_for("wan", tmp_path, request)
    state, before = card.encode(**{**wan.settings, **WAN_SIZE}), tiling_of(vae)
    with starving(vae, 7 * 7) as seen, pytest.raises(RuntimeError) as told:
        decoded(card, state, smaller=True)
    assert ran_out(told.value) and not seen and tiling_of(vae) == before


def test_a_failed_decode_leaves_nothing_in_the_decoder(wan: Reference) -> None:
    """Wan's keeps maps from one frame to the next, and drops them at the next decode only."""
    card = load_card(wan.folder, CPU, torch.float32)
    state, vae = card.encode(**wan.settings), card._parts["vae"]  # type: ignore[attr-defined]

    def ask(*_: object) -> None:
        torch.empty(HUGE, dtype=torch.uint8)

    hook = vae.decoder.conv_out.register_forward_pre_hook(ask)
    with pytest.raises(RuntimeError):
        card.decode(state)
    assert any(kept is not None for kept in vae._feat_map)
    with pytest.raises(RuntimeError):
        decoded(card, state, smaller=False)
    hook.remove()
    assert all(kept is None for kept in vae._feat_map)


def test_another_error_is_not_taken_for_it(
    wan: Reference, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    card, _ = card_for("wan", tmp_path, request)
    state = card.encode(**wan.settings)
    state.tensors["latents"] = state.tensors["latents"][:, :3]
    with pytest.raises(RuntimeError) as told:
        decoded(card, state, smaller=True)
    assert not ran_out(told.value)


def test_the_worker_makes_the_file_at_its_second_try(flux: Reference) -> None:
    """The first one is told as any failed allocation is."""
    weights = WeightStore(CPU)
    card = load_card(flux.folder, CPU, torch.float32, weights)
    desk = Desk((card, weights), flux, StepPace())
    desk.give("text", 1)
    desk.give("dit", STEPS)
    for attempt in (0, 1):
        desk.give("vae", 1, first_step=STEPS, attempt=attempt)
    with starving(card._parts["vae"], 8 * 8):  # type: ignore[attr-defined]
        *_, failed, made = desk.run()
    assert failed.failure is not None and failed.failure.reason == "OUT_OF_MEMORY"
    assert failed.failure.metadata["node"] == "vae"
    assert made.failure is None and made.last
    (media,) = [m for m in made.media.values() if m is not None]
    assert (media.info.width, media.info.height) == (28, 28)


def test_what_did_not_fit_whole_begins_with_tiles_and_tries_the_whole_now_and_then(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    card, vae = card_for("flux", tmp_path, request)
    reference: Reference = request.getfixturevalue("flux")
    state = card.encode(**{**reference.settings, **FLUX_SIZE})
    shape = types_pb2.Shape(width=FLUX_SIZE["width"], height=FLUX_SIZE["height"], frames=1)
    spec = types_pb2.GenerationSpec(shape=shape)
    decodes, tried = Decodes(), []

    def ask(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        tried.append(inputs[0].shape[-1] * inputs[0].shape[-2])

    def largest(name: str) -> int:
        """Of what the decoder was asked to do at once."""
        tried.clear()
        member = mesh_pb2.BatchMember(request_id=name, spec=spec)
        decodes.frames(card, member, state)
        return max(tried)

    whole_area = 112 * 80
    hook = vae.decoder.register_forward_pre_hook(ask)
    with starving(vae, whole_area):
        assert largest("fits") == whole_area, "there is room for just that"
    with starving(vae, 16 * 16):
        with pytest.raises(RuntimeError):
            largest("a")
        assert largest("a") == whole_area, "its second try: the whole, then tiles"
        assert all(largest(f"r{i}") < whole_area for i in range(32))
        assert largest("again") == whole_area, "there may be room by now"
        assert largest("still") < whole_area
    for _ in range(31):
        assert largest("tiles") < whole_area
    assert largest("roomy") == whole_area and largest("whole") == whole_area
    hook.remove()
