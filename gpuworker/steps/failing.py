"""What is told of a run that failed, or of one job of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from gpuworker.executor import Listener, RunNote, failure_of
from gpuworker.memory.budget import ran_out
from gpuworker.memory.latents import LatentMissing, LatentShelf
from gpuworker.models.card import ModelRefused, ShapeRefused
from gpuworker.operations.names import OperationRefused, artifact_of, operation_of
from gpuworker.steps.broken_device import is_broken
from gpuworker.steps.files import InputAway, InputMissing
from gpuworker.steps.run import Run
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

MODEL_ERROR, CALL_REFUSED = "MODEL_ERROR", "CALL_REFUSED"
INPUT_MISSING, INPUT_AWAY = "INPUT_MISSING", "INPUT_AWAY"
_REFUSED = (OperationRefused, ShapeRefused, ModelRefused)


def is_refused(member: mesh_pb2.BatchMember, error: Exception) -> bool:
    """Whether a workflow's call asks for something that cannot be done, on any worker."""
    return member.HasField("call") and isinstance(error, _REFUSED)


class Failures:
    """Of one worker; knows what it holds all the same."""

    def __init__(self, worker: str, shelf: LatentShelf) -> None:
        self._worker = worker
        self._shelf = shelf

    def of_run(
        self,
        run: Run,
        reason: str,
        message: str,
        suspects: Sequence[str] = (),
        *,
        named: str = "",
        last: bool = True,
        tried: Sequence[str] = (),
        spent: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        held: bool = True,
        artifact: str = "",
    ) -> RunNote:
        """What failed, `named` by whose fault where that is known; `held`: latents are left."""
        size = len(run.members) + (not last)
        failure = failure_of(reason, message, metadata)
        told = [m for m in run.assignment.batch if last or m.request_id == named]
        left = {m.request_id: self._held(run, m) for m in told if held}
        failed_job = mesh_pb2.FailedJob(
            request_id=named,
            batch=size,
            suspects=suspects,
            tried=tried,
            spent=spent,
            artifact=artifact,
        )
        return run.failed(left, failure, failed_job, last=last)

    def of_job(
        self, run: Run, member: mesh_pb2.BatchMember, error: Exception, *, last: bool = False
    ) -> RunNote:
        """One job of a batch failed by itself."""
        told, named, artifact = f"{type(error).__name__}: {error}", member.request_id, ""
        match error:
            case InputMissing():
                reason, artifact = INPUT_MISSING, error.name
            case InputAway():
                reason, artifact = INPUT_AWAY, error.name
            case _ if is_refused(member, error):
                reason, told = CALL_REFUSED, str(error)
            case _:
                reason = MODEL_ERROR
        return self.of_run(run, reason, told, named=named, last=last, artifact=artifact)

    def missing(self, run: Run, missing: LatentMissing, *, last: bool) -> RunNote:
        """Nobody could give what a job starts from."""
        return self.of_run(
            run,
            "LATENT_MISSING",
            str(missing),
            named=missing.request,
            last=last,
            tried=missing.tried,
            artifact=missing.artifact,
        )

    def give_up(
        self, run: Run, member: mesh_pb2.BatchMember, error: Exception, listener: Listener
    ) -> None:
        """One job of a batch fails by itself. Raises the error where others may be to blame."""
        if run.alone() or ran_out(error) or is_broken(error):
            raise error
        log.exception("%s in assignment %d", member.request_id, run.assignment.sequence)
        run.leave(member)
        if run.leads(self._worker):
            listener(self.of_job(run, member, error))

    def give_out(
        self,
        run: Run,
        member: mesh_pb2.BatchMember,
        missing: LatentMissing | InputMissing | InputAway,
        listener: Listener,
    ) -> None:
        """A job that cannot begin leaves its batch; the only one ends it, with that error."""
        if len(run.members) == 1 or (isinstance(missing, LatentMissing) and not missing.agreed):
            raise missing
        run.leave(member)
        if not run.leads(self._worker):
            return
        if isinstance(missing, LatentMissing):
            listener(self.missing(run, missing, last=False))
        else:
            listener(self.of_job(run, member, missing))

    def _held(self, run: Run, member: mesh_pb2.BatchMember) -> int | None:
        """Steps behind what this worker holds of what the run makes; a workflow's once-call makes
        nothing by halves.
        """
        if member.HasField("call") and not operation_of(run.assignment).stepped:
            return None
        return self._shelf.steps_done(member.request_id, artifact_of(member))
