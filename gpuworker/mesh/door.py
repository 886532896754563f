"""What a worker takes from the bus: each payload is checked before anything acts on it.

Whoever is on the bus can publish. What does not concern this process, or cannot be meant, is
counted and let go: it never ends the worker, and never makes it deaf for its leader.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from gpuworker.operations.names import CALLS, OperationRefused, model_of, operation_of, shape_of
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

TERM_RISE_MAX = 1 << 32  # of one message above the term that is known; a leader's rises by few
WAIT_US_MAX = 600_000_000  # of whoever asks for a latent; longer ones are cut
_BATCH_MAX, _MEMBERS_MAX, _STEPS_MAX = 32, 256, 100_000
_SIDE_MAX, _FRAMES_MAX = 1 << 15, 1 << 15
_TIMEOUT_US_MAX = 24 * 3600 * 1_000_000
_INPUTS_MAX, _SETTINGS_MAX = 16, 64  # of one call
_WORD = re.compile(r"[!-~]{1,128}")  # ids and names: printable, no blanks
_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,1024}")  # of tenants, too


class Door:
    """Of one worker's process."""

    def __init__(self, worker: str, incarnation: str) -> None:
        self._worker = worker
        self._incarnation = incarnation
        self.refused = 0  # messages that cannot be meant
        self.astray = 0  # messages for another process of this name

    def takes_assign(self, assign: mesh_pb2.Assign, known_term: int) -> bool:
        """Whether to act on it, `known_term` being the newest one seen."""
        if self._is_astray(assign.incarnation):
            return False
        return self._is_fine("assign", self._fault(assign, known_term))

    def takes_truncate(self, truncate: mesh_pb2.Truncate, known_term: int) -> bool:
        """As above."""
        if self._is_astray(truncate.incarnation):
            return False
        fault = _term_fault(truncate.term, known_term) or _word_fault(truncate.request_id)
        return self._is_fine("truncate", fault)

    def takes_request(self, asked: mesh_pb2.LatentRequest) -> bool:
        """Whether to answer it with a latent."""
        artifact = [asked.artifact] if asked.artifact else []
        fault = _word_fault(asked.request_id, *artifact)
        if asked.wait_us > _TIMEOUT_US_MAX:
            fault = fault or f"a wait of {asked.wait_us} µs"
        return self._is_fine("latent request", fault)

    def _is_astray(self, incarnation: str) -> bool:
        astray = bool(incarnation) and incarnation != self._incarnation
        self.astray += astray
        return astray

    def _is_fine(self, what: str, fault: str) -> bool:
        if fault:
            self.refused += 1
            if str(self.refused).strip("0") == "1":  # 1, 10, 100, …: a flood fills no disk
                log.warning("refused a message (%s, %d so far): %s", what, self.refused, fault)
        return not fault

    def _fault(self, assign: mesh_pb2.Assign, known_term: int) -> str:
        """What is wrong with an assignment message; empty: nothing."""
        fault = _term_fault(assign.term, known_term)
        for assignment in assign.assignments:
            fault = fault or self._assignment_fault(assignment, assign.term)
        for request in assign.released:
            fault = fault or _word_fault(request)
        for fetch in assign.fetches:
            artifact = [fetch.artifact] if fetch.artifact else []
            fault = fault or _word_fault(fetch.request_id, fetch.holder.worker, *artifact)
        return fault

    def _assignment_fault(self, assignment: mesh_pb2.Assignment, term: int) -> str:
        members, batch = assignment.group.members, assignment.batch
        if assignment.term != term or not assignment.sequence:
            return f"assignment {assignment.sequence} of term {assignment.term} in term {term}"
        if not 1 <= len(batch) <= _BATCH_MAX or not 1 <= len(members) <= _MEMBERS_MAX:
            return f"{len(batch)} jobs for {len(members)} workers"
        if self._worker not in members or len(set(members)) != len(members):
            return "members that are not this worker's group"
        if not 1 <= assignment.steps <= _STEPS_MAX:
            return f"{assignment.steps} steps"
        if max(assignment.collective_timeout_us, assignment.load_time_us) > _TIMEOUT_US_MAX:
            return "a time-out of more than a day"
        requests = [member.request_id for member in batch]
        if len(set(requests)) != len(requests):
            return "one job twice in a batch"
        fault = _call_fault(assignment) or _word_fault(assignment.node, *members, *requests)
        for member in batch:
            shape = shape_of(member)
            if max(shape.width, shape.height) > _SIDE_MAX or shape.frames > _FRAMES_MAX:
                fault = fault or f"a shape of {shape.width}x{shape.height}x{shape.frames}"
        return fault


def _term_fault(term: int, known_term: int) -> str:
    return f"term {term} after {known_term}" if term > known_term + TERM_RISE_MAX else ""


def _call_fault(assignment: mesh_pb2.Assignment) -> str:
    """What is wrong with what the jobs are to do: one operation of one model for all of them."""
    batch, first = assignment.batch, assignment.batch[0]
    try:
        operation = operation_of(assignment)
    except OperationRefused as refused:
        return str(refused)[:128]
    if any(member.HasField("call") != first.HasField("call") for member in batch):
        return "a batch of a workflow's jobs and a plain chain's"
    if not first.HasField("call"):
        return ""
    if any(m.call.op != operation.name for m in batch):
        return "a batch of several operations"
    if operation.part and any(model_of(m) != model_of(first) for m in batch):
        return "a batch of several models"
    if not operation.stepped and len(assignment.group.members) > 1:
        return f"{operation.name} on {len(assignment.group.members)} workers"
    return next((fault for member in batch if (fault := _job_fault(member.call))), "")


def _job_fault(call: mesh_pb2.NodeCall) -> str:
    if len(call.inputs) > _INPUTS_MAX or len(call.settings) > _SETTINGS_MAX:
        return f"{len(call.inputs)} inputs and {len(call.settings)} settings"
    if len(call.outputs) != 1:
        return f"{len(call.outputs)} outputs"
    ports = CALLS[call.op].inputs
    for each in call.inputs:
        if each.port not in ports:
            return f"input {each.port[:32]!r} of {call.op}"
        if bool(each.artifact) + bool(each.object_name) > 1:
            return f"two makers of {call.op}'s {each.port}"
    artifacts = [each.artifact for each in call.inputs if each.artifact]
    files = [each.object_name for each in call.inputs if each.object_name]
    return _word_fault(*call.outputs, *artifacts) or _file_fault(files)


def _file_fault(names: Sequence[str]) -> str:
    wrong = next((name for name in names if not _FILE_NAME.fullmatch(name)), None)
    return "" if wrong is None else f"the file {wrong[:64]!r}"


def _word_fault(*words: str) -> str:
    wrong = next((word for word in words if not _WORD.fullmatch(word)), None)
    return "" if wrong is None else f"the name {wrong[:64]!r}"
