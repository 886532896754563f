"""Words outside the embedded model's vocabulary: the nearest known prompt is used, and named."""

from __future__ import annotations

import pytest
import torch

from gpuworker.config import EMBEDDED_MODEL, EMBEDDED_MODELS
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


@pytest.fixture(scope="module")
def moving() -> WordTextEncoder:
    return WordTextEncoder.from_pretrained(EMBEDDED_MODELS[1] / "text_encoder")


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("a fox bouncing", "a fox bouncing"),
        ("A bouncing fox", "a bouncing fox"),
        ("a dog jumping", "a dog bouncing"),
        ("a dog", "a dog bouncing"),
        ("puppies that rotate on a navy background", "a dog spinning on a blue background"),
        ("a spaceship fliyng", "a rocket flying"),
        ("an apple drops over a red backdrop", "a red apple falling on a red background"),
        ("", ""),
    ],
)
def test_the_nearest_known_motion(moving: WordTextEncoder, asked: str, given: str) -> None:
    assert moving.resolve(asked).lower() == given
    assert moving.tokenize(asked).tolist() == moving.tokenize(given).tolist()


def test_a_motion_of_nothing_is_something_that_does_it(moving: WordTextEncoder) -> None:
    assert moving.resolve("jumping").endswith(" bouncing")


def test_every_known_moving_prompt_stays_as_it_is(moving: WordTextEncoder) -> None:
    for thing in range(1, len(moving.config.things) + 1):
        for motion in range(1, len(moving.config.motions) + 1):
            known = moving.phrase(thing, motion % len(moving.config.colours), motion)
            assert moving.resolve(known) == known
            assert moving.tokenize(known)[0, -1] == motion


def test_a_motion_changes_what_is_encoded(moving: WordTextEncoder) -> None:
    still, other = (moving(moving.tokenize(f"a fox {m}")) for m in ("bouncing", "falling"))
    assert not torch.equal(still[0], other[0]) and not torch.equal(still[1], other[1])
    assert still[0].shape[1] == moving.tokens and moving.tokens % 4 == 0


def test_folders_without_motions_encode_as_before(encoder: WordTextEncoder) -> None:
    assert not [name for name, _ in encoder.named_parameters() if "motion" in name]
    assert encoder.tokenize("a fox bouncing").shape == (1, 3)
    assert encoder.resolve("a fox bouncing") == "a fox"
