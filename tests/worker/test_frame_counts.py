"""Which numbers of frames a model takes: its family's, its folder's, and how they are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gpuworker.config import EMBEDDED_MODELS
from gpuworker.loading import LoadError, load_card
from gpuworker.model_info import model_info
from gpuworker.models.card import ModelRefused
from gpuworker.models.footprint import ModelCall
from gpuworker.models.frame_counts import FrameCounts, frame_counts
from hocket.v1 import generation_pb2
from tests.worker.tiny_cogvideox import cogvideox_15_reference
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import CPU

FAMILIES = {"ltx": (257, 8, 161), "wan": (121, 4, 81), "cogvideox": (49, 8, 9)}
FAMILIES["hunyuan"] = (129, 4, 129)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_takes_what_its_documentation_says(
    family: str, request: pytest.FixtureRequest
) -> None:
    reference: Reference = request.getfixturevalue(family)
    facts = load_card(reference.folder, CPU, torch.float32).facts
    assert (facts.frames_max, facts.frames_multiple, facts.frames_default) == FAMILIES[family]
    told = model_info(facts).frames
    most, multiple, default = FAMILIES[family]
    assert told == generation_pb2.FrameCounts(
        minimum=1, maximum=most, multiple=multiple, offset=1 % multiple, default_count=default
    )


def test_the_later_cogvideox_makes_longer_and_smoother_videos(tmp_path: Path) -> None:
    card = load_card(cogvideox_15_reference(tmp_path / "tiny").folder, CPU, torch.float32)
    assert (card.facts.frames_max, card.facts.fps) == (161, 16)


def test_pictures_have_no_number_of_frames(flux: Reference) -> None:
    assert not model_info(load_card(flux.folder, CPU, torch.float32).facts).HasField("frames")


def test_the_shipped_clips_are_at_most_as_long_as_those_of_training() -> None:
    info = model_info(load_card(str(EMBEDDED_MODELS[1]), CPU, torch.float32).facts)
    assert info.frames == generation_pb2.FrameCounts(
        minimum=2, maximum=16, multiple=2, offset=0, default_count=16
    )


@pytest.mark.parametrize(
    ("card", "counts"),
    [
        ({}, FrameCounts(4, 121, 81)),
        ({"frames_max": 33}, FrameCounts(4, 33, 33)),
        ({"frames_max": 36}, FrameCounts(4, 33, 33)),
        ({"frames_max": 161}, FrameCounts(4, 161, 81)),
        ({"frames_max": 161, "frames_default": 121}, FrameCounts(4, 161, 121)),
        ({"frames_default": 17}, FrameCounts(4, 121, 17)),
    ],
)
def test_a_folder_narrows_or_widens_it(card: dict[str, int], counts: FrameCounts) -> None:
    assert frame_counts(card, multiple=4, most=121, default=81) == counts


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ({"frames_max": 0}, "frames_max=0"),
        ({"frames_max": "9"}, "frames_max='9'"),
        ({"frames_default": 18}, "frames_default=18: allowed is 1..121, 1 more than a multiple"),
        ({"frames_default": 125}, "frames_default=125"),
        ({"frames_max": 9, "frames_default": 13}, r"allowed is 1\.\.9"),
    ],
)
def test_a_folder_that_makes_no_sense_is_told_so(card: dict[str, object], told: str) -> None:
    with pytest.raises(ModelRefused, match=told):
        frame_counts(card, multiple=4, most=121, default=81)


def test_such_a_folder_is_not_loaded(wan: Reference, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wan.folder, tmp_path / "wan"))
    (folder / "card.json").write_text(json.dumps({"frames_default": 4}))
    with pytest.raises(LoadError, match="frames_default=4"):
        load_card(str(folder), CPU, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_frames_need_more_memory(family: str, request: pytest.FixtureRequest) -> None:
    """In proportion to the latent frames, but for what does not depend on them."""
    reference: Reference = request.getfixturevalue(family)
    card = load_card(reference.folder, CPU, torch.float32)
    sizes = {"width": 512, "height": 320}
    few, more = 1 + card.facts.frames_multiple, 1 + 5 * card.facts.frames_multiple
    for node in ("dit", "vae"):
        short, long = (
            card.activation_bytes(ModelCall(node, **sizes, frames=n)) for n in (few, more)
        )
        assert 1.1 * short < long < 5 * short
    asked = {**reference.settings, **{"width": 64, "height": 32}}
    states = [card.encode(**asked | {"frames": n}).tensors["latents"] for n in (few, more)]
    grown = states[1].nbytes / states[0].nbytes
    assert grown == {"cogvideox": 11 / 3}.get(family, 6 / 2), "latents, by their frames"
