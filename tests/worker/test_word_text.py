"""Words outside the embedded model's vocabulary: the nearest known prompt is used, and named."""

from __future__ import annotations

import pytest
import torch

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.models.word_text import WordTextEncoder


@pytest.fixture(scope="module")
def encoder() -> WordTextEncoder:
    return WordTextEncoder.from_pretrained(EMBEDDED_MODEL / "text_encoder")


def test_every_known_prompt_stays_as_it_is(encoder: WordTextEncoder) -> None:
    things, colours = len(encoder.config.things), len(encoder.config.colours)
    for thing in range(1, things + 1):
        for colour in range(colours):
            known = encoder.phrase(thing, colour)
            assert encoder.resolve(known) == known


def test_there_are_a_hundred_things(encoder: WordTextEncoder) -> None:
    assert len(encoder.config.things) >= 100


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("A Fox", "a fox"),
        ("foxes", "a fox"),
        ("a puppy", "a dog"),
        ("a dragn on a blue background", "a dinosaur on a blue background"),
        ("a cup of coffee on a black background", "coffee on a black background"),
        ("", ""),
    ],
)
def test_the_nearest_known_prompt(encoder: WordTextEncoder, asked: str, given: str) -> None:
    assert encoder.resolve(asked).lower() == given


def test_nothing_falls_out_of_the_vocabulary(encoder: WordTextEncoder) -> None:
    for asked in ("a wyvern", "digit seven", "quantum chromodynamics", "x"):
        given = encoder.resolve(asked)
        assert given and encoder.resolve(given) == given
        assert torch.equal(encoder.tokenize(asked), encoder.tokenize(given))
