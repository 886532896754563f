"""What comes in over the network is checked here before anything is made of it.

A payload that decodes may still say anything: a name that breaks a subject, a term that nobody will
ever reach, a million members, a step that took longer than the world is old. One such message must
cost its sender that message and nobody anything else: it is refused, counted and said once.

The checks say why, or nothing; they never raise. What is bounded generously here is bounded again,
more narrowly, by whoever knows the models (gateway/validation.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence, Sized
from functools import lru_cache

from google.protobuf.message import Message

from hocket import loras
from hocket.errors import Violation
from hocket.v1 import control_pb2, generation_pb2, mesh_pb2, types_pb2
from hocket.workflows.checking import faults

TERMS_AHEAD_MAX = 1 << 32  # a term that is further ahead was never held by anybody
TIME_US_MAX = 86_400_000_000 * 30
SEQUENCE_MAX = 1 << 62
STEPS_MAX = 100_000
SIDE_MAX = 1 << 16
ITEMS_MAX = 65_536  # latents, pending assignments, groups, step times
MODELS_MAX = 1_024
MEMBERS_MAX = 1_024
DEGREE_MAX = 1_024
BATCH_MAX = 4_096
NAME_CHARS_MAX = 128
TEXT_CHARS_MAX = 32_768

_WORKER = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_REQUEST = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
_MODEL = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+/:@-]{0,127}")
_NODE = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_TENANT = re.compile(r"[0-9A-Za-z._-]{0,64}")
_KEY = re.compile(r"[0-9A-Za-z._:-]{0,128}")
_ARTIFACT = re.compile(rf"[0-9A-Za-z_.:@/-]{{0,{NAME_CHARS_MAX}}}")
_FILE = re.compile(rf"[0-9A-Za-z_.:@/-]{{1,{NAME_CHARS_MAX}}}")  # as requests call it …
_LACKED = re.compile(rf"[0-9A-Za-z_.:@/-]{{0,{2 * NAME_CHARS_MAX}}}")  # … and behind its tenant
_AS_REQUEST, _AS_MODEL = f"matches {_REQUEST.pattern}", f"matches {_MODEL.pattern}"
_DEADLINES, _SIDES = f"0 to {TIME_US_MAX}", f"1 to {SIDE_MAX}"
_TEXTS = f"at most {TEXT_CHARS_MAX} characters, no control characters"
_CONTROL_CHARS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class _Refused(Exception):
    """Why; never leaves this module."""


def check_heartbeat(beat: mesh_pb2.Heartbeat, term: int) -> str | None:
    """Why a heartbeat is refused by a control that knows of `term`; None: it is sound."""
    try:
        _heartbeat(beat, term)
    except _Refused as refused:
        return str(refused)
    return None


def check_report(report: mesh_pb2.StepReport, term: int) -> str | None:
    """Why a report is refused by a control that knows of `term`; None: it is sound."""
    try:
        _report(report, term)
    except _Refused as refused:
        return str(refused)
    return None


def check_submit(submit: control_pb2.SubmitRequest) -> tuple[Violation, ...]:
    """All that is wrong with a request, whichever models are served."""
    found: list[Violation] = []

    def need(field: str, right: bool, allowed: str) -> None:
        if not right:
            found.append(Violation(field, f"allowed: {allowed}"))

    request = submit.request
    need("request_id", bool(_REQUEST.fullmatch(submit.request_id)), _AS_REQUEST)
    need("request.tenant", bool(_TENANT.fullmatch(request.tenant)), _TENANT.pattern)
    need("request.idempotency_key", bool(_KEY.fullmatch(request.idempotency_key)), _KEY.pattern)
    need("request.priority", abs(request.priority) <= 100, "-100 to 100")
    slo = request.slo
    need("request.slo.deadline_us", slo.deadline_us <= TIME_US_MAX, _DEADLINES)
    _check_spec(request.spec, need)
    if submit.HasField("workflow"):
        found += [
            Violation(f"workflow.{fault.field}", fault.description)
            for fault in faults(submit.workflow)
        ]
    return tuple(found)


def _check_spec(spec: types_pb2.GenerationSpec, need: Callable[[str, bool, str], None]) -> None:
    shape, at = spec.shape, "request.spec."
    need(at + "model", bool(_MODEL.fullmatch(spec.model)), _AS_MODEL)
    need(at + "workflow", _is_name(spec.workflow), "a name")
    need(at + "media_type", _is_name(spec.media_type), "a media type")
    need(at + "shape.width", 1 <= shape.width <= SIDE_MAX, _SIDES)
    need(at + "shape.height", 1 <= shape.height <= SIDE_MAX, _SIDES)
    need(at + "shape.frames", shape.frames <= SIDE_MAX, f"0 to {SIDE_MAX}")
    need(at + "steps", 1 <= spec.steps <= STEPS_MAX, f"1 to {STEPS_MAX}")
    need(at + "guidance_scale", _is_number(spec.guidance_scale), "a number")
    for name, text in (("prompt", spec.prompt), ("negative_prompt", spec.negative_prompt)):
        sound = len(text) <= TEXT_CHARS_MAX and not _CONTROL_IN_TEXT.search(text)
        need(at + name, sound, _TEXTS)
    for number, allowed in loras.faults(spec.loras):
        need(f"{at}loras[{number}]", False, allowed)
    named = all(map(_is_name, spec.inputs)) and all(map(_FILE.fullmatch, spec.inputs.values()))
    need(at + "inputs", len(spec.inputs) <= 64 and named, f"64 names, of files: {_FILE.pattern}")


# -------------------------------------------------------------------------------- workers


def _heartbeat(beat: mesh_pb2.Heartbeat, term: int) -> None:
    _worker(beat.worker)
    _is_term(beat.term, term)
    device = beat.device
    for what, name in (
        ("incarnation is no name", beat.incarnation),
        ("store address is no name", beat.store_address),
        ("host is no name", beat.host),
        ("device is no name", device.kind),
        ("device is no name", device.profile_name),
        ("device is no name", device.name),
    ):
        _need(_is_name(name), what)
    _need(bool(beat.incarnation), "no incarnation is named")
    _need(beat.sequence <= SEQUENCE_MAX, "its number is out of range")
    _few(beat.models, MODELS_MAX, "models")
    for model in beat.models:
        wrong = _wrong_with_model(model.SerializeToString(deterministic=True))
        if wrong is not None:
            raise _Refused(f"model {_shown(model.name)}: {wrong}")
    _few(beat.latents, ITEMS_MAX, "latents")
    for latent in beat.latents:
        _request(latent.request_id)
        _need(latent.steps_done <= STEPS_MAX, "a latent has too many steps")
        if not _ARTIFACT.fullmatch(latent.artifact):
            raise _Refused(f"artifact {_shown(latent.artifact)} does not match its pattern")
    _few(beat.pending_sequences, ITEMS_MAX, "assignments")
    _few(beat.groups, ITEMS_MAX, "groups")
    for group in beat.groups:
        _members(group.members)
        _need(group.epoch <= SEQUENCE_MAX, "a group's epoch is out of range")
    _memory(beat.memory)


def _memory(memory: types_pb2.Memory) -> None:
    _few(memory.parts, ITEMS_MAX, "weights")
    for part in memory.parts:
        if not _MODEL.fullmatch(part.model):
            raise _Refused(f"weights of {_shown(part.model)}")
        if not _NODE.fullmatch(part.node):
            raise _Refused(f"weights of node {_shown(part.node)}")
        _part(part.part)
        _need(part.load_time_us <= TIME_US_MAX, "weights take too long to load")
        _need(max(part.size_bytes, part.peak_bytes) <= SEQUENCE_MAX, "weights are too large")
    _need(memory.budget_bytes <= SEQUENCE_MAX, "its memory is out of range")


@lru_cache(maxsize=4 * MODELS_MAX)  # workers repeat what they serve in every heartbeat
def _wrong_with_model(message: bytes) -> str | None:
    model = generation_pb2.ModelInfo.FromString(message)
    try:
        _need(bool(_MODEL.fullmatch(model.name)), "its name")
        _few(model.degrees, 64, "degrees")
        _need(all(1 <= d <= DEGREE_MAX for d in model.degrees), f"degrees are 1 to {DEGREE_MAX}")
        _need(model.batch_max <= BATCH_MAX, f"batches of more than {BATCH_MAX}")
        _need(model.steps_max <= STEPS_MAX, f"more than {STEPS_MAX} steps")
        _few(model.shapes, ITEMS_MAX, "shapes")
        for shape in model.shapes:
            _need(max(shape.width, shape.height, shape.frames) <= SIDE_MAX, "a shape")
        _need(max(model.size_multiple, model.size_min, model.size_max) <= SIDE_MAX, "its sizes")
        _few(model.parts, ITEMS_MAX, "parts")
        for part in model.parts:
            _need(bool(_NODE.fullmatch(part.node)), "a node of its parts")
            _part(part.part)
        _sound(model)
    except _Refused as refused:
        return str(refused)
    return None


def _part(name: str) -> None:
    _need(len(name) <= NAME_CHARS_MAX, "a part's name is too long")


def _report(report: mesh_pb2.StepReport, term: int) -> None:
    _worker(report.worker)
    _is_term(report.term, term)
    _need(report.sequence <= SEQUENCE_MAX, "its assignment is out of range")
    if not _NODE.fullmatch(report.node):
        raise _Refused(f"node {_shown(report.node)}")
    _members(report.members)
    _few(report.results, BATCH_MAX, "results")
    for result in report.results:
        _request(result.request_id)
        _need(result.steps_done <= STEPS_MAX, "a job has too many steps")
        _need(len(result.resolved_prompt) <= TEXT_CHARS_MAX, "a prompt is too long")
        if result.HasField("media"):
            _sound(result.media)
    for times_us in (report.step_time_us, report.member_time_us):
        _few(times_us, ITEMS_MAX, "times")
        _need(max(times_us, default=0) <= TIME_US_MAX, "a step took too long")
    setup_us = (report.group_time_us, report.transfer_time_us, report.load_time_us)
    _need(max(setup_us) <= TIME_US_MAX, "it began too late")
    if report.HasField("failure"):
        _need(bool(_REASON.fullmatch(report.failure.reason)), "the failure's reason is none")
        _need(len(report.failure.message) <= TEXT_CHARS_MAX, "the failure's message is too long")
    if report.HasField("failed_job"):
        failed = report.failed_job
        _need(failed.batch <= BATCH_MAX, "the failure's batch is out of range")
        for names in (failed.suspects, failed.tried, failed.spent):
            _members(names)
        if failed.request_id:
            _request(failed.request_id)
        if not _LACKED.fullmatch(failed.artifact):
            raise _Refused(f"artifact {_shown(failed.artifact)} does not match its pattern")


# -------------------------------------------------------------------------------- pieces


def _worker(name: str) -> None:
    if not _WORKER.fullmatch(name):
        raise _Refused(f"worker {_shown(name)} does not match {_WORKER.pattern}")


def _request(name: str) -> None:
    if not _REQUEST.fullmatch(name):
        raise _Refused(f"request {_shown(name)} does not match its pattern")


def _members(names: Sequence[str]) -> None:
    _few(names, MEMBERS_MAX, "members")
    for name in names:
        _worker(name)


def _is_term(said: int, term: int) -> None:
    if said > term + TERMS_AHEAD_MAX:
        raise _Refused(f"term {said} is out of reach of {term}")


def _is_name(name: str) -> bool:
    """Short, and printable."""
    return len(name) <= 2 * NAME_CHARS_MAX and not _CONTROL_CHARS.search(name)


def _is_number(number: float) -> bool:
    return math.isfinite(number) and abs(number) <= 1e9


def _sound(message: Message) -> None:
    """Texts are short and printable, numbers finite, at any depth."""
    for field, value in message.ListFields():
        repeated = isinstance(value, Iterable) and not isinstance(value, str | bytes)
        if (
            repeated
            and field.message_type is not None
            and field.message_type.GetOptions().map_entry
        ):
            raise _Refused(f"{field.name} is a map")
        for each in value if repeated else (value,):
            if isinstance(each, Message):
                _sound(each)
            elif isinstance(each, str):
                _need(len(each) <= TEXT_CHARS_MAX, f"{field.name} is too long")
                _need(not _CONTROL_IN_TEXT.search(each), f"{field.name} has control characters")
            elif isinstance(each, float):
                _need(math.isfinite(each), f"{field.name} is not finite")


def _few(items: Sized, most: int, what: str) -> None:
    if len(items) > most:
        raise _Refused(f"more than {most} {what}")


def _need(right: bool, otherwise: str) -> None:
    if not right:
        raise _Refused(otherwise)


def _shown(name: str) -> str:
    """Of a name that may be anything: enough to know it again, harmless in a log."""
    return repr(name[:64])
