"""What the jobs of a run start from, gathered before its first call: artifacts by port, and files.

A job of which nobody has an input leaves its batch, and so does one that is called off meanwhile;
the members of a group agree on it. What one member alone lacks is told to the others by the next
word.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuworker.executor import Listener
from gpuworker.memory.latents import CalledOff, LatentMissing
from gpuworker.models.card import ModelCard
from gpuworker.operations.making import JobCall
from gpuworker.operations.names import Operation, model_of, wanted_by
from gpuworker.state import LatentState
from gpuworker.steps.failing import Failures
from gpuworker.steps.fetching import Off
from gpuworker.steps.files import InputAway, InputFiles, InputMissing, names_of
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.run import Run
from gpuworker.steps.sources import Sources
from hocket.v1 import mesh_pb2

_FILE_WAIT_S = 30.0  # where the assignment names no time-out


class Gathering:
    """Of one worker."""

    def __init__(
        self,
        cards: Mapping[str, ModelCard],
        inbox: Inbox,
        sources: Sources,
        files: InputFiles,
        failures: Failures,
    ) -> None:
        self._cards = cards
        self._inbox = inbox
        self._sources = sources
        self._files = files
        self._failures = failures

    def jobs(
        self, run: Run, operation: Operation, listener: Listener, *, told_later: bool
    ) -> dict[str, JobCall]:
        """The jobs that can begin, by request. `told_later`: members of a group tell each other,
        before their first step, what they lack; jobs that one of them lacks something of are among
        these.
        """
        found: dict[str, JobCall] = {}
        for member in tuple(run.members):
            try:
                found[member.request_id] = self._job(run, operation, member, told_later)
            except (LatentMissing, InputMissing, InputAway) as missing:
                self._failures.give_out(run, member, missing, listener)
            except CalledOff:
                if len(run.members) == 1:
                    raise
                run.leave(member)
        return found

    def take_off(self, run: Run, operation: Operation, listener: Listener) -> None:
        """Jobs of which a member lacks an input do not begin, on any member."""
        for member, worker, number in run.took_off():
            wanted = wanted_by(operation, member)[number]
            missing = LatentMissing(
                member.request_id, wanted.version, (worker,), artifact=wanted.artifact
            )
            self._failures.give_out(run, member, missing, listener)

    def _job(
        self, run: Run, operation: Operation, member: mesh_pb2.BatchMember, told_later: bool
    ) -> JobCall:
        inputs: dict[str, LatentState] = {}
        for number, wanted in enumerate(wanted_by(operation, member)):
            try:
                inputs[wanted.port] = self._sources.obtain(run, member, wanted)
            except LatentMissing as missing:
                if missing.agreed or not told_later:
                    raise
                run.lack(member, number)  # the others are about to exchange the next input
        off = Off(self._inbox, run.assignment, member.request_id)
        timeout_s = run.assignment.collective_timeout_us / 1e6 or _FILE_WAIT_S
        files = {
            port: self._files.take(member.request_id, name, timeout_s, off)
            for port, name in names_of(member)
        }
        model = self._cards.get(model_of(member))
        fps = model.facts.fps if model is not None else 0
        return JobCall(member, model if operation.part else None, inputs, files, fps)
