"""Prompts that are asked for twice are encoded once, on a worker and its models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import Asked, ModelCard
from gpuworker.prompts import PromptCache
from gpuworker.torch_executor import load_cards
from tests.worker.tiny_models import Reference
from tests.worker.tiny_sd3 import sd3_pipeline
from tests.worker.worker_pool import CPU

MIB = 1 << 20


class Forwards:
    """Counts the calls of a card's text encoder."""

    def __init__(self, card: Any) -> None:
        self.count = 0
        hook = card._parts["text_encoder"].register_forward_hook(self._called)
        self.end = hook.remove

    def _called(self, *_: object) -> None:
        self.count += 1


@pytest.fixture(scope="module")
def folders(flux: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of the same parts; one has another tokenizer; and another family."""
    folder = tmp_path_factory.mktemp("prompts")
    worded = Path(shutil.copytree(flux.folder, folder / "worded"))
    told = worded / "tokenizer_2" / "tokenizer_config.json"
    config = json.loads(told.read_text())
    told.write_text(json.dumps(config | {"model_max_length": 7}))
    tuned = Path(shutil.copytree(flux.folder, folder / "tuned"))
    sd3_pipeline().save_pretrained(folder / "sd3")
    found = {"worded": worded, "tuned": tuned, "sd3": folder / "sd3"}
    return {"flux": flux.folder} | {name: str(path) for name, path in found.items()}


@pytest.fixture
def cards(folders: dict[str, str]) -> Iterator[dict[str, ModelCard]]:
    sources = tuple(f"{name}={folder}" for name, folder in folders.items())
    found = load_cards((*sources, str(EMBEDDED_MODEL)), CPU, WeightStore(CPU))
    cache = PromptCache(MIB)
    for card in found.values():
        card.prompts = cache
    yield found


def asked_of(card: ModelCard, **settings: Any) -> Asked:
    (width, height), facts = card.facts.size_default, card.facts
    asked = Asked("a fox", "", width, height, 1, 2, facts.guidance_default, 7)
    return asked._replace(**settings)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", ["flux", "sd3", "hocket-emoji"])
def test_a_prompt_is_encoded_once_and_the_states_are_equal(
    cards: dict[str, ModelCard], name: str
) -> None:
    card = cards[name]
    asked, forwards = asked_of(card), Forwards(card)
    other = asked._replace(seed=8)
    found = [card.encode(**a._asdict()).to_bytes() for a in (asked, other, asked)]
    assert forwards.count == (2 if name == "sd3" else 1), "SD3 has two texts here"
    card.prompts = None
    plain = [card.encode(**a._asdict()).to_bytes() for a in (asked, other, asked)]
    assert found == plain and found[0] != found[1], "what is recalled is what is made, to the bit"
    forwards.end()


def test_both_branches_are_kept_by_text(cards: dict[str, ModelCard]) -> None:
    card = cards["sd3"]
    forwards, cache = Forwards(card), card.prompts
    assert cache is not None
    card.embed(asked_of(card))
    card.embed(asked_of(card, prompt="a dog"))
    assert forwards.count == 3, "the empty text was there already"
    card.embed(asked_of(card, prompt="a dog", negative_prompt="a fox"))
    assert (forwards.count, cache.recalled, cache.encoded) == (3, 3, 3)
    forwards.end()


def test_models_share_what_their_encoders_and_tokenizers_make_alike(
    cards: dict[str, ModelCard],
) -> None:
    forwards = Forwards(cards["flux"])  # one part: the others' module, too
    made = cards["flux"].embed(asked_of(cards["flux"]))
    assert equal(dict(cards["tuned"].embed(asked_of(cards["tuned"])).tensors), dict(made.tensors))
    assert forwards.count == 1
    cards["worded"].embed(asked_of(cards["worded"]))
    assert forwards.count == 2, "another tokenizer may make other tokens"
    ids = {name: card.texts_id for name, card in cards.items()}
    assert ids["flux"] == ids["tuned"] and len(set(ids.values())) == len(ids) - 1
    forwards.end()


def test_a_cache_is_bounded_and_lets_the_oldest_go() -> None:
    def tensors(size: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(size, dtype=torch.uint8)}

    cache = PromptCache(100)
    for key in ("a", "b", "a", "c"):
        cache.recall(key, lambda: tensors(40))
    assert (cache.size_bytes, cache.recalled, cache.encoded) == (80, 1, 3)
    cache.recall("a", lambda: tensors(40))
    cache.recall("huge", lambda: tensors(101))
    cache.recall("b", lambda: tensors(40))
    assert (cache.size_bytes, cache.recalled, cache.encoded) == (80, 2, 5)
    cache.clear()
    assert cache.size_bytes == 0
