"""Steps that are launched before the last one is waited for: the same job, latents and notes.

A CPU's steps have ended when they return; here their ends are only looked at later, as a GPU's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.rendezvous import Rendezvous
from gpuworker.executor import FAILURE_CHARS_MAX, RunNote, StepNote
from gpuworker.loading import load_card
from gpuworker.memory.budget import Memory
from gpuworker.memory.latents import LatentShelf
from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState
from gpuworker.steps.broken_device import DeviceBroken, is_broken
from gpuworker.steps.engine import Engine
from gpuworker.steps.fetching import Fetcher
from gpuworker.steps.inbox import Inbox, StopMark
from gpuworker.steps.pace import MarkedCall, StepPace
from gpuworker.steps.sources import Sources
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import CPU

STEPS = 8

Loaded = tuple[ModelCard, WeightStore]


class LatePace(StepPace):
    """Looks at a step's end after the next one was launched, and notes the order."""

    ahead = True

    def __init__(self) -> None:
        self.order: list[str] = []

    def end(self, started: MarkedCall, step: int) -> MarkedCall:
        self.order.append(f"launched {step}")
        return super().end(started, step)

    def wait(self, ended: MarkedCall) -> StepNote:
        self.order.append(f"seen {ended.step}")
        return super().wait(ended)


class Desk:
    """An engine of one worker, run to the end of what it was given."""

    def __init__(self, loaded: Loaded, reference: Reference, pace: StepPace) -> None:
        card, weights = loaded
        self.inbox, self.notes, self.pace = Inbox(), [], pace
        self.rendezvous = Rendezvous()
        self.shelf = LatentShelf(self.rendezvous.put, self.rendezvous.drop)
        self._sequence = 0
        settings = reference.settings
        self._spec = types_pb2.GenerationSpec(
            model=card.facts.name,
            prompt=settings["prompt"],
            shape=types_pb2.Shape(width=settings["width"], height=settings["height"]),
            steps=STEPS,
            guidance_scale=settings["guidance_scale"],
            seed=settings["seed"],
        )
        groups = GroupCache(self.rendezvous, "w0", CPU)
        cards = {card.facts.name: card}
        sources = Sources("w0", self.inbox, self.shelf, Fetcher("w0", self.rendezvous, _nobody))
        memory = Memory(cards, CPU, weights, self.shelf)
        self._engine = Engine("w0", cards, self.inbox, self.shelf, groups, sources, pace, memory)

    def give(self, node: str, steps: int, first_step: int = 0, attempt: int = 0) -> None:
        self._sequence += 1
        member = mesh_pb2.BatchMember(
            request_id="r", spec=self._spec, first_step=first_step, attempt=attempt
        )
        self.inbox.put(
            mesh_pb2.Assignment(
                sequence=self._sequence,
                node=node,
                batch=[member],
                steps=steps,
                group=types_pb2.Group(epoch=1, members=["w0"]),
            )
        )

    def run(self) -> list[RunNote]:
        notes: list[RunNote] = []

        def heard(note: RunNote) -> None:
            notes.append(note)
            if note.last and note.assignment.sequence == self._sequence:
                self.inbox.close()

        self._engine.run(heard)
        return notes


def _nobody(holder: str, asked: mesh_pb2.LatentRequest, _: object) -> mesh_pb2.LatentReply:
    raise AssertionError("no latent is elsewhere")


@contextmanager
def failing(card: ModelCard, at_step: int) -> Iterator[None]:
    """The card runs out of memory when it is asked for that step."""
    step = card.step

    def bounded(states: list[LatentState], team: object) -> list[LatentState]:
        if states[0].steps_done == at_step:
            raise torch.OutOfMemoryError("planted")
        return step(states, team)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "step", bounded)
        yield


def test_a_failure_is_not_told_at_more_length_than_control_takes(
    flux: Reference, card: Loaded
) -> None:
    desk = Desk(card, flux, StepPace())
    desk.give("text", 1)
    desk.give("dit", STEPS)
    notes: list[RunNote] = []

    def heard(note: RunNote) -> None:
        notes.append(note)
        if note.failure is not None:
            desk.inbox.close()

    def wordy(*_: object) -> None:
        raise ValueError("first" + "x" * 50_000 + "last")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card[0], "step", wordy)
        desk._engine.run(heard)
    failure = notes[-1].failure
    assert failure is not None and failure.reason == "MODEL_ERROR"
    assert len(failure.message) <= FAILURE_CHARS_MAX
    assert failure.message.startswith("ValueError: first") and failure.message.endswith("last")


def test_a_device_that_is_broken_ends_the_worker_once_that_is_told(
    flux: Reference, card: Loaded
) -> None:
    """A CUDA error is sticky: whoever went on would fail everything, at once."""
    desk = Desk(card, flux, StepPace())
    desk.give("text", 1)
    desk.give("dit", STEPS)
    desk.give("dit", STEPS)
    notes: list[RunNote] = []

    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card[0], "step", broken)
        with pytest.raises(DeviceBroken, match="illegal memory access"):
            desk._engine.run(notes.append)
    told = notes[-1]
    assert told.failure is not None and told.failed_job is not None
    assert (told.failure.reason, told.assignment.sequence) == ("DEVICE_BROKEN", 2)
    assert list(told.failed_job.suspects) == ["w0"] and not told.behind


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("CUDA error: said by a card"), False),
    ],
)
def test_which_errors_say_that_the_device_is_broken(error: Exception, broken: bool) -> None:
    assert is_broken(error) == broken
    outer = RuntimeError("a step failed")
    outer.__cause__ = error
    assert is_broken(outer) == broken


@pytest.fixture
def card(flux: Reference) -> Loaded:
    weights = WeightStore(CPU)
    return load_card(flux.folder, CPU, torch.float32, weights), weights


@pytest.mark.parametrize("pace", [StepPace(), LatePace()], ids=["at once", "late"])
def test_the_picture_and_the_notes_are_the_same(
    card: Loaded, flux: Reference, pace: StepPace
) -> None:
    desk = Desk(card, flux, pace)
    desk.give("text", 1)
    desk.give("dit", STEPS)
    _, *notes = desk.run()
    assert [step.step for note in notes for step in note.steps] == list(range(STEPS))
    assert [note.steps_done for note in notes] == [
        sum(len(n.steps) for n in notes[: place + 1]) for place in range(len(notes))
    ]
    state = desk.shelf.get("r", STEPS)
    assert state is not None
    assert float((state.tensors["latents"] - flux.latents).abs().max()) < 1e-4


def test_a_late_pace_launches_one_step_ahead(card: Loaded, flux: Reference) -> None:
    pace = LatePace()
    desk = Desk(card, flux, pace)
    desk.give("text", 1)
    desk.give("dit", 3)
    desk.run()
    text, steps = pace.order[:2], pace.order[2:]
    assert text == ["launched 0", "seen 0"]
    assert steps == ["launched 0", "launched 1", "seen 0", "launched 2", "seen 1", "seen 2"]


@pytest.mark.parametrize("pace", [StepPace(), LatePace()], ids=["at once", "late"])
def test_a_truncation_stops_at_its_step(card: Loaded, flux: Reference, pace: StepPace) -> None:
    desk = Desk(card, flux, pace)
    desk.inbox.truncate("r", StopMark(0, 3))
    desk.give("text", 1)
    desk.give("dit", STEPS)
    *_, last = desk.run()
    assert last.steps_done == 3 and desk.shelf.steps_done("r") == 3


@pytest.mark.parametrize("pace", [StepPace(), LatePace()], ids=["at once", "late"])
def test_after_a_failure_a_latent_is_held_that_can_be_gone_on_from(
    card: Loaded, flux: Reference, pace: StepPace
) -> None:
    desk = Desk(card, flux, pace)
    desk.give("text", 1)
    desk.give("dit", STEPS)
    with failing(card[0], at_step=5):
        *_, last = desk.run()
    assert last.failure is not None and last.failure.reason == "OUT_OF_MEMORY"
    held = desk.shelf.steps_done("r")
    assert held == last.steps_done and held in (4, 5)
