"""The wire formats, frozen by literal examples (docs/ARCHITECTURE.md): subjects, payloads, tracks.

A change that breaks one of these breaks a running mesh of mixed versions: it needs an ADR.
"""

from __future__ import annotations

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from hocket.messaging.bus import Subjects
from hocket.v1 import journal_pb2, mesh_pb2

SUBJECTS = Subjects("prod")

ASSIGN = """{
  "term": "3", "round": "17", "planDigest": "9f",
  "assignments": [{
    "sequence": "41", "node": "dit", "steps": 5, "term": "3",
    "batch": [{
      "requestId": "01abc", "firstStep": 10, "stepsTotal": 20, "attempt": 1,
      "holders": [{"worker": "w0", "stepsDone": 10, "storeAddress": "127.0.0.1:5000"}],
      "spec": {"model": "hocket-emoji", "workflow": "txt2img", "prompt": "a fox",
               "shape": {"width": 128, "height": 128, "frames": 1}, "steps": 20, "seed": "7"},
      "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    }],
    "group": {"epoch": "12884901889", "members": ["w0", "w1"]},
    "layout": {"cfg": 1, "ulysses": 2, "ring": 1},
    "rendezvousAddress": "127.0.0.1:5000",
    "predictedStepTimeUs": "42000", "collectiveTimeoutUs": "5000000"
  }],
  "released": ["01abb"]
}"""
REPORT = """{
  "worker": "w0", "incarnation": "f00d", "term": "3", "sequence": "41", "node": "dit",
  "results": [{"requestId": "01abc", "attempt": 1, "stepsDone": 11}],
  "members": ["w0", "w1"], "stepTimeUs": ["41876"], "groupTimeUs": "3400", "reportSequence": "9",
  "memberTimeUs": ["31200", "40012"]
}"""
JOURNAL = """{
  "term": "3", "sequence": "8", "stampedUs": "1000",
  "plan": {"round": "17", "nowUs": "990", "digest": "9f", "assignments": 1, "planTimeUs": "212"}
}"""


@pytest.mark.parametrize(
    ("subject", "literal"),
    [
        (SUBJECTS.assign("w0"), "hocket.v1.prod.assign.w0"),
        (SUBJECTS.truncate("w0"), "hocket.v1.prod.truncate.w0"),
        (SUBJECTS.report("w0"), "hocket.v1.prod.report.w0"),
        (SUBJECTS.heartbeat("w0"), "hocket.v1.prod.heartbeat.w0"),
        (SUBJECTS.latent("w0"), "hocket.v1.prod.latent.w0"),
        (SUBJECTS.event("01abc"), "hocket.v1.prod.event.01abc"),
        (SUBJECTS.journal("accepted"), "hocket.v1.prod.journal.accepted"),
    ],
)
def test_subjects(subject: str, literal: str) -> None:
    assert subject == literal


@pytest.mark.parametrize(
    ("kind", "literal", "first_bytes"),
    [
        (mesh_pb2.Assign, ASSIGN, "08031011"),
        (mesh_pb2.StepReport, REPORT, "0a0277301204"),
        (journal_pb2.JournalEntry, JOURNAL, "0803100818e807"),
    ],
)
def test_payloads(kind: type[Message], literal: str, first_bytes: str) -> None:
    message = json_format.Parse(literal, kind())
    wire = message.SerializeToString(deterministic=True)
    assert wire.hex().startswith(first_bytes)
    assert kind.FromString(wire) == message


def test_an_unknown_field_is_no_payload_of_ours() -> None:
    with pytest.raises(json_format.ParseError):
        json_format.Parse(ASSIGN.replace('"node"', '"knot"'), mesh_pb2.Assign())
