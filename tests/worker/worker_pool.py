"""Worker processes for tests: real stores, real gloo groups, no world.

A pool forks its processes from a server that has torch and diffusers imported, so that one more
costs milliseconds. Each process waits for (function, arguments), runs the function with its
`Member` as first argument and sends the result back. The functions live in `worker_tasks`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.rendezvous import Rendezvous
from gpuworker.loading import load_card
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState

CPU = torch.device("cpu")
PRELOADED = ["torch", "diffusers", "transformers", "gpuworker.loading", __name__]
ANSWER_S = 60.0


@dataclass
class Member:
    """What a worker process has: its name, store, groups, models and latents, and a way to call."""

    name: str
    rendezvous: Rendezvous
    groups: GroupCache
    notes: Connection
    cards: dict[str, ModelCard] = field(default_factory=dict)
    shelf: dict[str, LatentState] = field(default_factory=dict)

    def card(self, folder: str) -> ModelCard:
        """The card of a model folder, loaded once."""
        if folder not in self.cards:
            self.cards[folder] = load_card(folder, CPU, torch.float32)
        return self.cards[folder]


class Failed(Exception):
    """A task raised; the text is the worker's traceback."""


def _serve(name: str, tasks: Connection, notes: Connection) -> None:
    torch.set_num_threads(1)
    rendezvous = Rendezvous()
    member = Member(name, rendezvous, GroupCache(rendezvous, name, CPU), notes)
    tasks.send(rendezvous.address)
    while True:
        try:
            function, arguments = tasks.recv()
        except EOFError:
            os._exit(0)
        try:
            tasks.send((True, function(member, *arguments)))
        except Exception:
            tasks.send((False, traceback.format_exc()))


@dataclass
class _Process:
    process: Any
    tasks: Connection
    notes: Connection
    address: str


class Pool:
    """Four workers that stay for the whole session; one that was killed is replaced by `heal`."""

    def __init__(self, size: int = 4) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._processes: dict[str, _Process] = {}
        self._size, self._started, self._epoch = size, 0, 0
        self.heal()

    @property
    def names(self) -> list[str]:
        """The workers that are alive, oldest first."""
        return list(self._processes)

    def address(self, name: str) -> str:
        """The rendezvous address of a worker."""
        return self._processes[name].address

    def next_epoch(self) -> int:
        """A number that no group of this pool has used."""
        self._epoch += 1
        return self._epoch

    def heal(self) -> None:
        """Starts new workers, under new names, until there are enough."""
        for name, worker in tuple(self._processes.items()):
            if not worker.process.is_alive():
                del self._processes[name]
        while len(self._processes) < self._size:
            name = f"w{self._started}"
            self._started += 1
            tasks, theirs = self._context.Pipe()
            notes, their_notes = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(name, theirs, their_notes), daemon=True
            )
            process.start()
            theirs.close()
            their_notes.close()
            assert tasks.poll(ANSWER_S), f"{name} did not start"
            self._processes[name] = _Process(process, tasks, notes, tasks.recv())

    def start(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Gives a worker something to do."""
        self._processes[name].tasks.send((function, arguments))

    def result(self, name: str) -> Any:
        """Waits for what a worker was given to do. Raises `Failed`."""
        tasks = self._processes[name].tasks
        assert tasks.poll(ANSWER_S), f"{name} does not answer"
        succeeded, result = tasks.recv()
        if not succeeded:
            raise Failed(f"{name}: {result}")
        return result

    def note(self, name: str) -> Any:
        """Waits for something that a running task tells."""
        notes = self._processes[name].notes
        assert notes.poll(ANSWER_S), f"{name} tells nothing"
        return notes.recv()

    def each(
        self, names: Sequence[str], function: Callable[..., Any], *arguments: Any
    ) -> list[Any]:
        """Runs one function in several workers at once; results in their order."""
        for name in names:
            self.start(name, function, *arguments)
        return [self.result(name) for name in names]

    def one(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function in one worker."""
        return self.each([name], function, *arguments)[0]

    def kill(self, name: str) -> None:
        """SIGKILL, and waits until the process is gone."""
        process = self._processes[name].process
        process.kill()
        process.join(ANSWER_S)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to a worker's process."""
        os.kill(self._processes[name].process.pid, number)

    def close(self) -> None:
        """Ends all workers."""
        for name in self.names:
            self.kill(name)
