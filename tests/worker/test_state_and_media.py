"""Latent states as bytes, pictures as media (videos: test_videos.py), unloadable models."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpuworker.loading import LoadError, load_card
from gpuworker.model_info import model_info
from gpuworker.models.card import ShapeRefused
from gpuworker.models.solvers import SolverRefused
from gpuworker.state import Fact, LatentState, StateCorrupt
from gpuworker.steps.media import encode_media
from hocket.v1.types_pb2 import MediaInfo
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import CPU


def some_state() -> LatentState:
    """A state with several types, an empty tensor and one that is not contiguous."""
    tensors = {
        "latents": torch.arange(12.0).view(3, 4).T,
        "ids": torch.tensor([[1, 2]]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
    }
    facts: dict[str, Fact] = {
        "prompt": "ein Füchslein",
        "width": 64,
        "guidance_scale": 1.5,
        "x": None,
        "y": True,
    }
    return LatentState(tensors, 2, 20, facts)


def test_state_round_trip() -> None:
    state = some_state()
    blob = state.to_bytes()
    back = LatentState.from_bytes(blob)
    assert (back.steps_done, back.steps_total, dict(back.facts)) == (2, 20, dict(state.facts))
    assert set(back.tensors) == set(state.tensors)
    for name, tensor in state.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)
    assert back.to_bytes() == blob
    assert state.nbytes == 12 * 4 + 2 * 8 + 2 * 2


def test_advancing_leaves_the_old_state() -> None:
    state = some_state()
    later = state.advanced(torch.zeros(4, 3))
    assert (state.steps_done, later.steps_done) == (2, 3)
    assert state.tensors["latents"].sum() == 66 and later.tensors["latents"].sum() == 0
    assert later.tensors["ids"] is state.tensors["ids"]


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_damaged_blob_is_named(cut: int) -> None:
    with pytest.raises(StateCorrupt):
        LatentState.from_bytes(some_state().to_bytes()[:cut])


def test_a_png_has_pixels_and_nothing_else() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), dtype=np.uint8)
    content, info = encode_media(frames)
    assert info == MediaInfo(media_type="image/png", width=12, height=8, frames=1)
    assert encode_media(frames) == (content, info)
    assert not any(chunk in content for chunk in (b"tEXt", b"iTXt", b"zTXt", b"tIME"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), frames[0])


def copied(reference: Reference, tmp_path: Path) -> Path:
    """A copy of a model folder that may be spoilt."""
    return Path(shutil.copytree(reference.folder, tmp_path / "spoilt"))


@pytest.mark.parametrize("missing", ["model_index.json", "vae", "text_encoder_2"])
def test_what_is_missing_is_named(flux: Reference, tmp_path: Path, missing: str) -> None:
    folder = copied(flux, tmp_path)
    (folder / missing).rename(folder / "away")
    with pytest.raises(LoadError) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == missing


@pytest.mark.parametrize(
    ("component", "entry", "missing"),
    [
        ("transformer", ["diffusers", "LatteTransformer3DModel"], "LatteTransformer3DModel"),
        ("vae", ["diffusers", "NoSuchThing"], "diffusers.NoSuchThing"),
        ("vae", ["os", "system"], "os.system"),
        ("scheduler", [None, None], "scheduler"),
        ("transformer_2", ["diffusers", "WanTransformer3DModel"], "transformer_2"),
    ],
)
def test_an_index_that_cannot_be_served_is_named(
    flux: Reference, tmp_path: Path, component: str, entry: list[str], missing: str
) -> None:
    folder = copied(flux, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, component: entry}))
    with pytest.raises(LoadError) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == missing


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(LoadError):
        load_card("/no/such/folder", CPU, torch.float32)


def test_a_scheduler_whose_past_cannot_travel_is_refused(wan: Reference, tmp_path: Path) -> None:
    folder = copied(wan, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SolverRefused, match="PNDM"):
        load_card(str(folder), CPU, torch.float32)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("width", {"width": 30}),
        ("height", {"height": 4096}),
        ("frames", {"frames": 2}),
        ("steps", {"steps": 0}),
        ("guidance_scale", {"guidance_scale": -1.0}),
        ("negative_prompt", {"negative_prompt": "blue"}),
    ],
)
def test_settings_that_the_model_cannot_do(
    flux: Reference, field: str, change: dict[str, object]
) -> None:
    card = load_card(flux.folder, CPU, torch.float32)
    with pytest.raises(ShapeRefused) as refused:
        card.encode(**{**flux.settings, **change})
    assert refused.value.field == field


def test_facts_of_the_tiny_models(flux: Reference, wan: Reference) -> None:
    facts = load_card(flux.folder, CPU, torch.float32).facts
    assert (facts.name, facts.family, facts.guidance) == ("tiny-flux", "flux", "embedded")
    assert facts.degrees == (1, 2, 4)
    facts = load_card(wan.folder, CPU, torch.float32).facts
    assert (facts.family, facts.workflows, facts.guidance) == ("wan", ("txt2vid",), "true_cfg")


def test_a_folder_that_names_no_sizes_takes_all_that_its_arithmetic_does(
    flux: Reference, wan: Reference, tmp_path: Path
) -> None:
    """Also without card.json, as it is published; an operator may set limits."""
    (copied(flux, tmp_path) / "card.json").unlink()
    card = load_card(str(tmp_path / "spoilt"), CPU, torch.float32)
    info = model_info(card.facts)
    limits = (info.size_multiple, info.size_min, info.size_max, info.pixels_max)
    assert limits == (4, 4, 2048, 2048 * 2048)
    for size in ((28, 44), (52, 4)):
        state = card.encode("a fox", "", *size, 1, 4, 3.5, 1)
        (state,) = card.step([state], None)
        assert card.decode(state).shape == (1, size[1], size[0], 3)
    assert model_info(load_card(wan.folder, CPU, torch.float32).facts).pixels_max == 1280 * 720
    (tmp_path / "spoilt" / "card.json").write_text('{"pixels_max": 65536, "size_max": 512}')
    facts = load_card(str(tmp_path / "spoilt"), CPU, torch.float32).facts
    assert model_info(facts).pixels_max == 65536 and model_info(facts).size_max == 512
    with pytest.raises(ShapeRefused, match="at most 65536 pixels"):
        facts.check(512, 132, 1, 4, 3.5)
    (tmp_path / "spoilt" / "card.json").write_text('{"sizes": [[64, 64]]}')
    facts = load_card(str(tmp_path / "spoilt"), CPU, torch.float32).facts
    assert (model_info(facts).size_multiple, len(model_info(facts).shapes)) == (0, 1)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"pixels_max": 10}, "pixels_max=10: allowed is 65536, of the default size, or more"),
        ({"pixels_max": "1"}, "pixels_max='1'"),
        ({"size_max": 4096}, "size_max=4096: allowed is at most the family's 2048"),
    ],
)
def test_limits_that_cannot_be(
    flux: Reference, tmp_path: Path, limits: dict[str, object], said: str
) -> None:
    folder = copied(flux, tmp_path)
    (folder / "card.json").write_text(json.dumps(limits))
    with pytest.raises(LoadError, match=said) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == "card.json"


def test_a_folder_that_names_no_sizes_offers_its_default(flux: Reference, wan: Reference) -> None:
    for reference, told in ((flux, (256, 256, 1, 0)), (wan, (832, 480, 81, 16))):
        (shape,) = model_info(load_card(reference.folder, CPU, torch.float32).facts).shapes
        assert (shape.width, shape.height, shape.frames, shape.fps) == told
