"""Registered workflows on a real broker: versions, bounds, and what outlives a leader."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from control import workflow_registry
from control.workflow_registry import VERSIONS_MAX, WorkflowRegistry
from hocket.errors import HocketError, InvalidRequest, Refused, from_rpc_error
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import control_pb2, generation_pb2, mesh_pb2
from hocket.v1.workflows_pb2 import (
    DeleteWorkflowRequest,
    GetWorkflowRequest,
    ListWorkflowsRequest,
    RegisterWorkflowRequest,
    WorkflowSpec,
)
from hocket.workflows.catalogue import OPERATIONS
from hocket.workflows.content import named
from hocket.workflows.running import run_form
from hocket.workflows.shipped import shipped
from tests.control.replica import MODEL, asking, beat_for_ever, replica
from tests.control.stage import running, submit_of


def own(name: str = "own", steps: int = 0) -> WorkflowSpec:
    spec = WorkflowSpec()
    spec.CopyFrom(shipped()["two-pass"])
    spec.name, spec.digest, spec.shipped = name, "", False
    spec.nodes[1].settings["steps"].number_value = steps
    return spec


async def test_versions_are_kept_and_named_by_digest(bus: Bus, subjects: Subjects) -> None:
    registry = WorkflowRegistry(bus, subjects)
    first = await registry.register(own())
    assert first.digest == shipped()["two-pass"].digest and not first.shipped
    assert await registry.register(own()) == first, "the same again changes nothing"
    second = await registry.register(own(steps=4))
    assert await registry.get("own") == second
    assert await registry.get(named(first)) == first
    assert await registry.get(f"own@{first.digest}") == first
    assert [spec.name for spec in await registry.all()] == sorted([*shipped(), "own"])
    again = await registry.register(own())  # an older content is the newest version now
    assert await registry.get("own") == again == first
    for steps in range(1, VERSIONS_MAX + 4):
        newest = await registry.register(own(steps=steps))
    with pytest.raises(Refused, match="known"):
        await registry.get(named(first))
    assert await WorkflowRegistry(bus, subjects).get("own") == newest, "another leader reads it"


async def test_what_is_refused(
    bus: Bus, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow_registry, "NAMES_MAX", 1)
    registry = WorkflowRegistry(bus, subjects)
    for name in ("two-pass", "txt2img"):
        with pytest.raises(InvalidRequest, match="comes with the software"):
            await registry.register(own(name))
    broken = own()
    broken.output = "media.image"
    broken.nodes[0].op = "sing"
    with pytest.raises(InvalidRequest) as caught:
        await registry.register(broken)
    assert {v.field for v in caught.value.violations} >= {"output", "nodes[0].op"}
    checked = await registry.register(own(), only_check=True)
    assert checked.digest and "own" not in [spec.name for spec in await registry.all()]
    await registry.register(own())
    with pytest.raises(Refused) as full:
        await registry.register(own("other"))
    assert full.value.reason == "TOO_MANY_WORKFLOWS"
    monkeypatch.setattr(workflow_registry, "NAMES_MAX", 2)
    monkeypatch.setattr(workflow_registry, "LISTED_BYTES_MAX", 2 * own().ByteSize())
    with pytest.raises(Refused, match="bytes together"):
        await registry.register(own("other"))
    await registry.register(own(steps=2))
    monkeypatch.setattr(workflow_registry, "LISTED_BYTES_MAX", 3 << 20)
    with pytest.raises(InvalidRequest, match="comes with the software"):
        await registry.delete("img2img")
    await registry.delete("own")
    await registry.register(own("other"))
    for missing in ("own", "nobody"):
        for call in (registry.get(missing), registry.delete(missing)):
            with pytest.raises(Refused) as unknown:
                await call
            assert unknown.value.reason == "UNKNOWN_WORKFLOW" and "other" in str(unknown.value)
    with pytest.raises(InvalidRequest, match="8 or more hex digits"):
        await registry.get("own@12")


async def test_two_leaders_at_once_lose_no_version(bus: Bus, subjects: Subjects) -> None:
    one, two = WorkflowRegistry(bus, subjects), WorkflowRegistry(bus, subjects)
    await asyncio.gather(one.all(), two.all())
    made = await asyncio.gather(
        *(leader.register(own(steps=n)) for n, leader in enumerate((one, two, one, two)))
    )
    fresh = WorkflowRegistry(bus, subjects)
    for spec in made:
        assert await fresh.get(named(spec)) == spec
    await one.delete("own")
    await two.register(own("own", 9))  # it had read what is gone
    assert [s.name for s in await WorkflowRegistry(bus, subjects).all()].count("own") == 1


async def test_they_outlive_the_leader(
    bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path
) -> None:
    async def ask(address: str, method: str, request: object) -> object:
        async with asking(address) as client:
            try:
                return await getattr(client.stub, method)(request, timeout=20)
            except grpc.aio.AioRpcError as error:
                return from_rpc_error(error)

    spec = own()
    async with replica(nats_url, subjects.cluster, tmp_path / "a") as first:
        address = await first.leads()
        made = await ask(address, "RegisterWorkflow", RegisterWorkflowRequest(workflow=spec))
        digest = made.workflow.digest  # type: ignore[attr-defined]
        spec.nodes[0].op = "sing"
        wrong = await ask(address, "RegisterWorkflow", RegisterWorkflowRequest(workflow=spec))
        assert isinstance(wrong, InvalidRequest) and "nodes[0].op" in str(wrong)
    async with replica(nats_url, subjects.cluster, tmp_path / "b") as second:
        address = await second.leads()
        beats = asyncio.ensure_future(beat_for_ever(bus, subjects))
        found = await ask(address, "GetWorkflow", GetWorkflowRequest(name=f"own@{digest[:8]}"))
        assert found.workflow.digest == digest  # type: ignore[attr-defined]
        listed = await ask(address, "ListWorkflows", ListWorkflowsRequest())
        assert "own" in [one.name for one in listed.workflows]  # type: ignore[attr-defined]
        await ask(address, "DeleteWorkflow", DeleteWorkflowRequest(name="own"))
        gone = await ask(address, "GetWorkflow", GetWorkflowRequest(name="own"))
        assert isinstance(gone, HocketError) and gone.reason == "UNKNOWN_WORKFLOW"
        beats.cancel()


async def test_a_workflow_that_makes_no_sense_is_no_promise() -> None:
    async with running() as stage:
        submit = submit_of("r")
        submit.workflow.CopyFrom(own())
        submit.workflow.nodes[0].op = "sing"
        answer = await stage.desk.admission.submit(submit)
        assert answer.rejected.reason == "INVALID_REQUEST"
        assert "workflow.nodes[0].op" in answer.rejected.message
        submit.request_id = "s"
        submit.workflow.CopyFrom(own())
        answers: list[control_pb2.SubmitResponse] = []
        stage.desk.admission.offer(submit, lambda answer, _: answers.append(answer))
        await stage.until(lambda: answers)
        assert answers[0].rejected.reason == "WORKFLOW_NOT_SERVED" and not stage.shelf.stored


async def test_a_promise_with_a_workflow_waits_for_workers_behind_a_restart(
    bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path
) -> None:
    """It is taken up while no worker is there, and its calls go to the first one that comes."""
    form = run_form(shipped()["two-pass"], {"prompt"}).spec
    submit = submit_of("r")
    submit.request.spec.model, submit.request.detached = MODEL, True
    submit.workflow.CopyFrom(form)
    model = generation_pb2.ModelInfo(name=MODEL, operations=OPERATIONS)
    model.shapes.add(width=32, height=32)
    offered = [name for name, rule in OPERATIONS.items() if not rule.part]
    beating = (bus, subjects, "w0", model, offered)
    async with replica(nats_url, subjects.cluster, tmp_path / "a") as first:
        beats = asyncio.ensure_future(beat_for_ever(*beating))
        async with asking(await first.leads()) as client:
            while True:
                answer = await client.stub.Submit(submit, timeout=20)
                if answer.HasField("accepted"):
                    break
                await asyncio.sleep(0.05)
    beats.cancel()
    async with replica(nats_url, subjects.cluster, tmp_path / "b") as second:
        async with asking(await second.leads()) as client:
            asked = control_pb2.GetRequestRequest(request_id="r")
            found = await client.stub.GetRequest(asked, timeout=20)
            accepted = found.status.metadata.accepted
            assert not found.status.HasField("ended") and accepted.effective_spec.model == MODEL
        assigns = await bus.follow(subjects.assign("w0"), mesh_pb2.Assign)
        beats = asyncio.ensure_future(beat_for_ever(*beating))
        while not (assign := await assigns.next()).assignments:
            pass  # what tells of releases alone
        (member,) = assign.assignments[0].batch
        assert (member.request_id, member.call.op) == ("r", "encode_prompt")
        assert member.call.shape == submit.request.spec.shape
        beats.cancel()
