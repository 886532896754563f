"""Whatever decodes is judged: a reason, or nothing; never an exception, and nothing unsound in."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from control import translate
from control.entrance.door import TERMS_AHEAD_MAX, check_heartbeat, check_report, check_submit
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import Arrived, AssignmentFailed, Request, Shape
from control.workers.leases import Leases
from hocket.v1 import control_pb2, mesh_pb2, types_pb2

PROFILE = "model,gpu,node,width,height,frames,degree,batch,call_us\n" + "".join(
    f"m,g,{node},64,64,1,1,1,1000\n" for node in ("text", "dit", "vae")
)
STRINGS = st.one_of(
    st.sampled_from(
        ["w0", "m", "text", "dit", "01J0000000000000000000000A", "GROUP_LOST", "g", ""]
    ),
    st.text(max_size=8),
    st.sampled_from(["a b", "a\n", "x" * 5_000, "w0.*", ">", "ñ", "\x00", "w" * 63, "w" * 64]),
)
NUMBERS = st.one_of(
    st.integers(0, 4),
    st.sampled_from([2**20, 2**31 - 1, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**64 - 1]),
)
FLOATS = st.one_of(st.floats(allow_nan=True), st.sampled_from([0.0, 1.0, math.nan, math.inf]))


def messages(kind: type[Message], depth: int = 3) -> st.SearchStrategy[Message]:
    """Messages of a kind with anything in any field."""

    @st.composite
    def drawn(draw: Any) -> Message:
        message = kind()
        for field in kind.DESCRIPTOR.fields:
            if draw(st.booleans()):
                _fill(draw, message, field, depth)
        return message

    return drawn()


def _fill(draw: Any, message: Message, field: FieldDescriptor, depth: int) -> None:
    nested = field.message_type
    if nested is not None and nested.GetOptions().map_entry:
        value, values = nested.fields_by_name["value"].message_type, getattr(message, field.name)
        if value is None:
            values.update(draw(st.dictionaries(STRINGS, STRINGS, max_size=2)))
        elif depth:
            of = messages(value._concrete_class, depth - 1)
            for name, one in draw(st.dictionaries(STRINGS, of, max_size=2)).items():
                values[name].CopyFrom(one)
    elif nested is not None and depth:
        of = messages(nested._concrete_class, depth - 1)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(of, max_size=2)))
        else:
            getattr(message, field.name).CopyFrom(draw(of))
    elif nested is None:
        values = _values(field)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values, max_size=3)))
        else:
            setattr(message, field.name, draw(values))


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type == field.CPPTYPE_STRING:
        return st.binary(max_size=40) if field.type == field.TYPE_BYTES else STRINGS
    if field.cpp_type == field.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return FLOATS
    if field.cpp_type == field.CPPTYPE_ENUM:
        return st.sampled_from([v.number for v in field.enum_type.values])
    bits = 64 if field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_INT64) else 32
    most = 2**bits - 1 if field.cpp_type in (field.CPPTYPE_UINT64, field.CPPTYPE_UINT32) else 100
    return NUMBERS.filter(lambda n: n <= most)


def beat(**fields: Any) -> mesh_pb2.Heartbeat:
    whole: dict[str, Any] = {"worker": "w0", "incarnation": "a", **fields}
    return mesh_pb2.Heartbeat(**whole)


def report(**fields: Any) -> mesh_pb2.StepReport:
    return mesh_pb2.StepReport(**{"worker": "w0", "node": "dit", **fields})


def submit(**fields: Any) -> control_pb2.SubmitRequest:
    sent = control_pb2.SubmitRequest(request_id=fields.pop("request_id", "01J0"))
    spec = types_pb2.GenerationSpec(
        model="m", steps=4, shape=types_pb2.Shape(width=64, height=64), prompt="a\nb"
    )
    sent.request.spec.CopyFrom(spec)
    for name, value in fields.items():
        setattr(sent.request.spec, name, value)
    return sent


def test_what_is_sound_comes_in() -> None:
    assert check_heartbeat(beat(term=7), 3) is None
    assert check_report(report(), 3) is None
    assert check_submit(submit()) == ()


@pytest.mark.parametrize(
    "name", ["a b", "", "W0", "a\n", "-a", "w" * 64, "w" * 5_000, "w*", "w>", "ñ", "a\u2028"]
)
def test_a_workers_name_has_a_pattern(name: str) -> None:
    for why in (check_heartbeat(beat(worker=name), 1), check_report(report(worker=name), 1)):
        assert why is not None and len(why) < 300 and why.isprintable()


def test_terms_are_within_reach_of_the_known_one() -> None:
    assert check_heartbeat(beat(term=5 + TERMS_AHEAD_MAX), 5) is None
    for far in (6 + TERMS_AHEAD_MAX, 2**60, 2**62, 2**64 - 1):
        assert check_heartbeat(beat(term=far), 5) and check_report(report(term=far), 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("model", ""),
        ("model", "m\x00"),
        ("prompt", "x" * 40_000),
        ("prompt", "a\x07"),
        ("media_type", "image/png\n"),
    ],
)
def test_a_request_is_checked_field_by_field(field: str, value: object) -> None:
    (violation,) = check_submit(submit(**{field: value}))
    assert violation.field == f"request.spec.{field}"


def test_all_that_is_wrong_is_told_at_once() -> None:
    sent = submit(request_id="a b", steps=0)
    sent.request.spec.shape.width = 0
    found = [v.field for v in check_submit(sent)]
    assert found == ["request_id", "request.spec.shape.width", "request.spec.steps"]


def test_models_and_counts_are_bounded() -> None:
    one = beat()
    one.models.add(name="m", degrees=[2**31])
    assert check_heartbeat(one, 1)
    many = beat()
    for i in range(1_025):
        many.models.add(name=f"m{i}")
    assert check_heartbeat(many, 1)
    assert check_heartbeat(beat(pending_sequences=range(70_000)), 1)
    assert check_report(report(step_time_us=[2**63]), 1)


@pytest.mark.parametrize(
    ("name", "held", "missed"),
    [
        ("", True, True),
        ("refine-1.latents", True, True),
        (f"{'t' * 64}/sha256:{'0' * 64}", False, True),  # a file; nobody holds one
        ("a b", False, False),
        ("a.b\n", False, False),
        ("ñ.b", False, False),
        ("x" * 5_000, False, False),
    ],
)
def test_names_of_artifacts_are_short_and_plain(name: str, held: bool, missed: bool) -> None:
    holds = beat(latents=[mesh_pb2.HeldLatent(request_id="01J0", artifact=name)])
    lacks = report(failed_job=mesh_pb2.FailedJob(request_id="01J0", artifact=name))
    for why, sound in ((check_heartbeat(holds, 1), held), (check_report(lacks, 1), missed)):
        assert why is None if sound else why and len(why) < 300 and why.isprintable()


@pytest.mark.parametrize("name", ["a b", "", "x" * 129, "ñ"])
def test_files_of_a_request_have_names_that_reports_may_carry(name: str) -> None:
    sent = submit()
    sent.request.spec.inputs["image"] = f"sha256:{'0' * 64}"
    assert check_submit(sent) == ()
    sent.request.spec.inputs["image"] = name
    (violation,) = check_submit(sent)
    assert violation.field == "request.spec.inputs"


@settings(max_examples=300, deadline=None)
@given(messages(mesh_pb2.Heartbeat), st.sampled_from([0, 1, 2**40]))
def test_any_heartbeat_is_judged_and_what_comes_in_harms_nobody(
    message: mesh_pb2.Heartbeat, term: int
) -> None:
    why = check_heartbeat(message, term)
    assert why is None or (why and why.isprintable() and len(why) < 500)
    if why is None:
        scheduler = Scheduler(Settings(policy="hocket"), Profile.from_csv(PROFILE))
        for fact in Leases(2_000_000).heartbeat(message, 10):
            scheduler.observe(fact)
        scheduler.plan(20)


def busy() -> Scheduler:
    """A scheduler whose worker w0 runs the encode of a request."""
    scheduler = Scheduler(Settings(policy="hocket"), Profile.from_csv(PROFILE))
    one = beat(device=mesh_pb2.Device(profile_name="g"))
    one.models.add(name="m", degrees=[1])
    for fact in Leases(2_000_000).heartbeat(one, 0):
        scheduler.observe(fact)
    request = Request(id="01J0", model="m", shape=Shape(width=64, height=64), steps=2)
    scheduler.observe(Arrived(at_us=1, request=request))
    assert scheduler.plan(1).assignments
    return scheduler


@settings(max_examples=300, deadline=None)
@given(messages(mesh_pb2.StepReport), st.booleans(), st.sampled_from([0, 1, 2**40]))
def test_any_report_is_judged_and_what_comes_in_harms_nobody(
    message: mesh_pb2.StepReport, ours: bool, term: int
) -> None:
    if ours:  # about something that is outstanding
        message.worker, message.sequence, message.node = "w0", 1, "text"
        for result in message.results:
            result.request_id, result.attempt = "01J0", 0
    why = check_report(message, term)
    assert why is None or (why and why.isprintable() and len(why) < 500)
    if why is None:
        scheduler = busy()
        scheduler.observe(translate.to_event(message, 2_000))
        scheduler.plan(3_000)


def test_a_report_of_a_missing_artifact_names_it() -> None:
    report = mesh_pb2.StepReport(worker="w0", sequence=1, last=True)
    report.failure.reason = "LATENT_MISSING"
    report.failed_job.artifact = "enlarge.image"
    fact = translate.to_event(report, 5)
    assert isinstance(fact, AssignmentFailed) and fact.artifact == "enlarge.image"


@settings(max_examples=300, deadline=None)
@given(messages(control_pb2.SubmitRequest))
def test_any_request_is_judged(message: control_pb2.SubmitRequest) -> None:
    found = check_submit(message)
    if not found:
        scheduler = busy()
        request = translate.to_request(message, 5)
        scheduler.observe(Arrived(at_us=5, request=request))
        scheduler.plan(6)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_that_decode_are_judged(junk: bytes) -> None:
    for kind, check in (
        (mesh_pb2.Heartbeat, check_heartbeat),
        (mesh_pb2.StepReport, check_report),
    ):
        try:
            message = kind.FromString(junk)
        except DecodeError:
            continue
        check(message, 1)
