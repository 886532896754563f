"""The step loop of a torch worker: take assignment → group → latents → steps → report.

Runs in one compute thread. It talks to peers only through the group (collectives) and their stores
(latents), to the agent only through `Inbox` and the listener. Two rules keep many workers exact and
free of deadlocks:

* Every member takes every assignment, in sequence order, and enters its group, truncated or not.
  Before each step the first member decides whether the group goes on, and with which jobs of a
  batch, and tells the others by a control word; nobody leaves alone. By the same exchange, and by
  one more behind the last step, each tells how much of a step was its own. All members make the
  same exchanges, whatever happens: they hang on nothing but words and the steps made.
* A step returns a new latent. The old one stays on the shelf until the new one is complete, so
  whatever survives a crash is the exact state after some step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.groups import Group, GroupLost, GroupSpent
from gpuworker.executor import Listener, RunNote, Stopwatch
from gpuworker.memory.budget import Memory, OutOfMemory
from gpuworker.memory.latents import CalledOff, LatentMissing, LatentShelf
from gpuworker.memory.weights import StoreClosed
from gpuworker.models.card import ModelCard
from gpuworker.operations.names import operation_of
from gpuworker.steps.broken_device import DeviceBroken, is_broken
from gpuworker.steps.calling import OnceCalls, Truncated
from gpuworker.steps.encoding import EncodingThreads, NotesInOrder
from gpuworker.steps.failing import MODEL_ERROR, Failures, is_refused
from gpuworker.steps.fetching import Off
from gpuworker.steps.files import InputAway, InputFiles, InputMissing, NoFiles
from gpuworker.steps.gathering import Gathering
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.pace import StepPace
from gpuworker.steps.run import Run
from gpuworker.steps.sources import Sources
from gpuworker.steps.stepping import SteppedCalls
from hocket.tracing import spans, telemetry

log = logging.getLogger(__name__)

_GROUP_SPAN_AT_LEAST_NS = 500_000  # joining a cached group is no news
_FORM_TIMEOUT_S = 10.0
DEVICE_BROKEN = "DEVICE_BROKEN"


class Engine:
    """Owns the compute thread's world: models, groups, artifacts."""

    def __init__(
        self,
        worker: str,
        cards: Mapping[str, ModelCard],
        inbox: Inbox,
        shelf: LatentShelf,
        groups: GroupCache,
        sources: Sources,
        pace: StepPace,
        memory: Memory,
        encoding: EncodingThreads | None = None,
        files: InputFiles | None = None,
    ) -> None:
        """`encoding`: by what finished frames become files; its owner closes it."""
        self._worker = worker
        self._inbox = inbox
        self._groups = groups
        self._pace = pace
        self._memory = memory
        self._sources = sources
        self._failures = failures = Failures(worker, shelf)
        gathering = Gathering(cards, inbox, sources, files or NoFiles(), failures)
        encoding = encoding or EncodingThreads()
        self._once = OnceCalls(inbox, shelf, groups, gathering, failures, pace, encoding)
        self._stepped = SteppedCalls(worker, cards, inbox, shelf, groups, gathering, failures, pace)

    def run(self, listener: Listener) -> None:
        """Runs assignments until the inbox is closed. Raises `DeviceBroken`, once that is told.

        `listener` is called by this thread, or by one that has made a file.
        """
        torch.set_grad_enabled(False)
        self._pace.enter()
        while (assignment := self._inbox.take()) is not None:
            run = Run(assignment)
            notes = NotesInOrder(listener, partial(self._inbox.done, assignment))
            traced = telemetry.within(assignment.batch[0].traceparent)
            with traced, self._sources.in_hand(assignment):
                note = self._run(run, notes)
            if note is not None and (run.leads(self._worker) or note.failure is not None):
                notes(note)
            notes.close()
            failure = None if note is None else note.failure
            if failure is not None and failure.reason == DEVICE_BROKEN:
                raise DeviceBroken(failure.message)

    def _run(self, run: Run, notes: NotesInOrder) -> RunNote | None:
        """Runs an assignment; what is still to be told of it."""
        failed = self._failures.of_run
        try:
            with self._memory.at_work(run.assignment, run.sides):
                run.group = self._join(run)
                operation = operation_of(run.assignment)
                if operation.stepped:
                    return self._stepped.run(run, operation, notes)
                return self._once.run(run, operation, notes)
        except (Truncated, CalledOff, StoreClosed):
            return failed(run, "TRUNCATED", "called off before it began")
        except GroupSpent as spent:
            return failed(run, "GROUP_SPENT", str(spent), spent=spent.spent)
        except GroupLost as lost:
            return self._lost(run, lost)
        except LatentMissing as missing:
            if not missing.agreed:
                self._abort(run)
            return self._failures.missing(run, missing, last=True)
        except (InputMissing, InputAway) as missing:
            return self._failures.of_job(run, run.members[0], missing, last=True)
        except OutOfMemory as error:
            self._abort(run)
            return failed(run, "OUT_OF_MEMORY", str(error), metadata=error.metadata)
        except Exception as error:
            log.exception("assignment %d failed", run.assignment.sequence)
            self._abort(run)
            told = f"{type(error).__name__}: {error}"
            if is_broken(error):  # nothing that is on the device can be had any more
                return failed(run, DEVICE_BROKEN, told, suspects=(self._worker,), held=False)
            if len(run.members) == 1 and is_refused(run.members[0], error):
                return self._failures.of_job(run, run.members[0], error, last=True)
            return failed(run, MODEL_ERROR, told)

    def _lost(self, run: Run, lost: GroupLost) -> RunNote:
        """Forming, it names who was missing; inside a collective nobody knows who failed, unless
        one has only given the group up, and says so.
        """
        failed = self._failures.of_run
        if run.group is None:
            return failed(run, "GROUP_LOST", str(lost), lost.suspects)
        if spent := self._groups.spent_by(run.group):
            return failed(run, "GROUP_SPENT", str(lost), spent=spent)
        others = tuple(n for n in run.assignment.group.members if n != self._worker)
        return failed(run, "GROUP_LOST", str(lost), others)

    def _join(self, run: Run) -> Group | None:
        named, began = run.assignment.group, Stopwatch()
        if len(named.members) == 1:
            return None
        group = self._groups.get(
            named.epoch,
            tuple(named.members),
            run.assignment.rendezvous_address,
            _FORM_TIMEOUT_S + run.assignment.load_time_us / 1e6,
            Off(self._inbox, run.assignment),
        )
        group.timeout_s = run.assignment.collective_timeout_us / 1e6
        waited = run.assignment.load_time_us > 0  # for others' weights: says nothing of forming
        if began.elapsed_ns() > _GROUP_SPAN_AT_LEAST_NS and not waited:
            run.sides.append(began.side(spans.GROUP, {}))
        return group

    def _abort(self, run: Run) -> None:
        if run.group is not None:
            run.group.abort()
