"""Cards of which only some components have weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.folders.identity import FileDigests
from gpuworker.loading import LoadError, distinct_bytes, load_card
from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import ModelCard
from gpuworker.operations.names import ROLES, offered
from tests.worker.tiny_models import flux_reference, wan_reference

CPU = torch.device("cpu")


def card_of(folder: Path, *roles: str) -> tuple[ModelCard, WeightStore]:
    store = WeightStore(CPU)
    return load_card(str(folder), CPU, torch.float32, store, FileDigests(), roles), store


def test_cards_of_one_role_make_together_what_a_whole_one_makes(tmp_path: Path) -> None:
    flux, wan = tmp_path / "flux", tmp_path / "wan"
    sizes = {
        EMBEDDED_MODEL: (64, 64, 1),
        flux: (flux_reference(flux) and 64, 64, 1),
        wan: (wan_reference(wan) and 64, 64, 5),
    }
    for folder, (width, height, frames) in sizes.items():
        whole, store = card_of(folder, *ROLES)
        guidance = whole.facts.guidance_default
        asked = ("a red fox", "", width, height, frames, 2, guidance, 3)
        apart = {role: card_of(folder, role) for role in ROLES}
        ours, alone = whole.encode(*asked), apart["text"][0].encode(*asked)
        while not ours.finished:
            (ours,) = whole.step([ours], None)
            (alone,) = apart["dit"][0].step([alone], None)
        assert (whole.decode(ours) == apart["vae"][0].decode(alone)).all(), folder.name
        name = whole.facts.name
        held = {role: set(each.model_parts(name)) for role, (_, each) in apart.items()}
        assert set().union(*held.values()) == set(store.model_parts(name))
        for role, (card, each) in apart.items():
            assert card.facts == whole.facts, "every card knows the model"
            assert {node for node, _ in held[role]} == {role}
            assert sum(fact.size_bytes for fact in each.facts()) < sum(
                fact.size_bytes for fact in store.facts()
            )


def test_weights_of_other_roles_need_not_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    shutil.copytree(EMBEDDED_MODEL, folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    dit_bytes, digests = weights.stat().st_size, FileDigests()
    whole = distinct_bytes((str(folder),), digests)
    assert whole - distinct_bytes((str(folder),), digests, ("text", "vae")) == dit_bytes
    weights.unlink()
    card, _ = card_of(folder, "text", "vae")
    operations = offered(card.operations, ("text", "vae"))
    assert operations == ("encode_prompt", "decode", "encode_image")
    with pytest.raises(LoadError, match="transformer"):
        card_of(folder, "dit")
