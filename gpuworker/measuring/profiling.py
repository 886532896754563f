"""Measures call times between real processes, without a broker and without control.

One process a worker. They meet in groups as workers do (`groups.py`), and make the very calls that
an assignment makes: `ModelCard.encode`, `step` under a layout, `decode` and the file. A cell is
measured by as many groups side by side as `busy` workers make, since that is how a loaded host
runs.

    parent  ── ProfileCell ──▶ process 0 (rank 0) ── times ──▶ parent
            ── ProfileCell ──▶ process 1 (rank 1) ── times ──▶    only first members' times count
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.groups import Group
from gpuworker.collectives.rendezvous import Rendezvous
from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.loading import LoadError
from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import CardFacts, ModelCard
from gpuworker.state import LatentState
from gpuworker.steps import media
from gpuworker.steps.pace import pace_of
from gpuworker.torch_executor import load_cards, pick_device
from gpuworker.torch_worker import gpu_name, set_native_environment

TEXT, DIT, VAE = "text", "dit", "vae"
WARM_UPS = 2  # calls before those that count
FORM_S = 60.0
STEP_S = 600.0  # a collective that takes longer hangs
_PRELOADED = ["torch", "diffusers", "transformers", "gpuworker.loading", __name__]
_PROMPT = "a fox on a green background"


@dataclass(frozen=True)
class ProfileCell:
    """What is measured: one node at one shape, layout and batch."""

    node: str
    width: int
    height: int
    frames: int
    layout: GroupLayout
    batch: int
    calls: int


class CellFailed(Exception):
    """A cell that cannot be measured here; the text says why."""


class Bench:
    """The processes. To be used as a context manager; leaving it ends them."""

    def __init__(self, model: str, device: str, workers: int) -> None:
        set_native_environment()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._epoch = 0
        for index in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(index, model, device, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def ready(self) -> tuple[CardFacts, str]:
        """Waits for all models; the model's facts and the device's name. Raises: CellFailed."""
        answers = _answers(self._pipes)
        self._addresses = [address for _, _, address in answers]
        return answers[0][0], answers[0][1]

    def measure(self, cell: ProfileCell, busy: int) -> list[int]:
        """Times of all calls of the groups side by side, in microseconds. Raises: CellFailed."""
        degree = cell.layout.degree
        self._epoch += 1
        side_by_side = max(1, min(busy, len(self._pipes)) // degree)
        for worker in range(side_by_side * degree):
            first = worker // degree * degree
            names = tuple(f"p{i}" for i in range(first, first + degree))
            self._pipes[worker].send((cell, self._epoch, names, self._addresses[first]))
        answers = _answers(self._pipes[: side_by_side * degree])
        return [us for first in answers[::degree] for us in first]


def _answers(pipes: Sequence[Connection]) -> list[Any]:
    """What all of them say; all are heard before a failure is raised, or else the next cell would
    hear what is left.
    """
    told: list[tuple[bool, Any]] = []
    for pipe in pipes:
        try:
            told.append(pipe.recv())
        except EOFError:
            told.append((False, "a process ended; is there memory enough?"))
    for succeeded, answer in told:
        if not succeeded:
            raise CellFailed(answer)
    return [answer for _, answer in told]


def _serve(index: int, model: str, device: str, pipe: Connection) -> None:
    """One worker's process: loads the model, then measures what it is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends this process, too
    try:
        where = pick_device(device, index)
        (card,) = load_cards((model,), where, WeightStore(where)).values()
        rendezvous = Rendezvous()
    except LoadError as error:
        pipe.send((False, str(error)))
        os._exit(1)
    groups = GroupCache(rendezvous, f"p{index}", where)
    pipe.send((True, (card.facts, gpu_name(where.type, where.index or 0), rendezvous.address)))
    while True:
        try:
            cell, epoch, names, address = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            group = groups.get(epoch, names, address, FORM_S) if len(names) > 1 else None
            pipe.send((True, _calls(card, cell, group, where)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


def _calls(
    card: ModelCard, cell: ProfileCell, group: Group | None, where: torch.device
) -> list[int]:
    """Makes all calls of a cell; the times of those that count."""
    if group is not None:
        group.timeout_s = STEP_S
    team = Team(group, cell.layout) if group is not None else None
    states = [_encoded(card, cell, seed) for seed in range(1, cell.batch + 1)]
    pace, times_us = pace_of(where), []
    for call in range(WARM_UPS + cell.calls):
        if group is not None:  # as before each step of an assignment
            group.share_words(call, 0, 0, 0)
        began = pace.start(group)
        _call(card, cell, states, team)
        times_us.append(pace.wait(pace.end(began, call)).duration_us)
    return times_us[WARM_UPS:]


def _call(
    card: ModelCard, cell: ProfileCell, states: Sequence[LatentState], team: Team | None
) -> None:
    """What one assignment of the node does, for all jobs of the batch."""
    if cell.node == TEXT:
        for seed in range(1, cell.batch + 1):
            _encoded(card, cell, seed)
    elif cell.node == VAE:
        for state in states:
            media.encode_media(card.decode(state), "", card.facts.fps)
    else:
        card.step(states, team)


def _encoded(card: ModelCard, cell: ProfileCell, seed: int) -> LatentState:
    facts = card.facts
    return card.encode(
        prompt=_PROMPT,
        negative_prompt="",
        width=cell.width,
        height=cell.height,
        frames=cell.frames,
        steps=facts.steps_default,
        guidance_scale=facts.guidance_default,
        seed=seed,
    )
