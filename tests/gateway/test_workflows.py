"""Workflows and uploads at a gateway, with a real leader and a real broker behind it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nats.js.errors import NotFoundError
from PIL import Image
from typer.testing import CliRunner

from gateway.service import running
from gateway.settings import GatewaySettings
from hocket.cli.__main__ import app
from hocket.client import HocketClient
from hocket.errors import AccessDenied, InvalidRequest, NotAuthenticated, Refused, from_rpc_error
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.subjects import input_object
from hocket.security import api_keys
from hocket.tracing import telemetry
from hocket.v1.generation_pb2 import InputHeader, ModelInfo, PutInputRequest
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.catalogue import OPERATIONS
from hocket.workflows.content import named
from hocket.workflows.shipped import shipped
from tests.control.replica import beat_for_ever, replica
from tests.gateway.conftest import SERVING, Staging
from tests.gateway.peer import EMOJI
from tests.gateway.test_pictures import red, saved
from tests.gateway.test_workflow_requests import OTHER

KEPT_S = 600.0


@dataclass
class Mesh:
    """A gateway with a leader and a worker that only beats."""

    address: str
    client: HocketClient
    state_dir: Path

    async def hocket(self, *arguments: str) -> tuple[int, str]:
        told = [*arguments, "--address", self.address, "--state-dir", str(self.state_dir)]
        result = await asyncio.to_thread(CliRunner().invoke, app, told)
        return result.exit_code, result.output


@asynccontextmanager
async def mesh(
    bus: Bus, subjects: Subjects, url: str, at: Path, **settings: object
) -> AsyncIterator[Mesh]:
    told = telemetry.setup("gateway", "t", at, "warning")
    weighty = [name for name, rule in OPERATIONS.items() if rule.part]
    model = ModelInfo(operations=[*weighty, "denoise.mask"])
    model.MergeFrom(EMOJI)
    beats = asyncio.ensure_future(beat_for_ever(bus, subjects, model=model))
    try:
        async with replica(url, subjects.cluster, at / "control", inputs_kept_s=KEPT_S) as leader:
            found = GatewaySettings(
                cluster=subjects.cluster,
                nats_url=url,
                state_dir=at,
                control=await leader.leads(),
                grace_s=0.5,
                **settings,  # type: ignore[arg-type]
            )
            async with running(found, told) as address, HocketClient(address) as client:
                await serving(address)
                await stored(bus, subjects)
                yield Mesh(address, client, at)
    finally:
        beats.cancel()
        told.close()


async def serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async for answer in watch:
            if answer.status == SERVING:
                return


async def stored(bus: Bus, subjects: Subjects) -> None:
    """Returns once the leader has made the bucket of inputs."""
    while True:
        try:
            await bus.jetstream.stream_info(f"OBJ_{subjects.input_bucket}")
            return
        except NotFoundError:
            await asyncio.sleep(0.02)


def own(name: str = "own", steps: int = 4) -> WorkflowSpec:
    spec = WorkflowSpec()
    spec.CopyFrom(shipped()["two-pass"])
    spec.name, spec.digest, spec.shipped = name, "", False
    spec.nodes[1].settings["steps"].number_value = steps
    return spec


async def wrong(client: HocketClient, **options: object) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        await client.create("a red fox", **options)  # type: ignore[arg-type]
    return {violation.field: violation.description for violation in caught.value.violations}


async def promised(client: HocketClient, workflow: str) -> str:
    """The workflow that a request was accepted with."""
    made = await client.create("a red fox", workflow=workflow)
    return made.metadata.accepted.effective_spec.workflow


async def test_registered_named_and_accepted(
    bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path
) -> None:
    async with mesh(bus, subjects, nats_url, tmp_path) as stage:
        client = stage.client
        unknown = await wrong(client, workflow="own")
        assert all(word in unknown["spec.workflow"] for word in ("txt2img", "two-pass", "inpaint"))
        made = await client.register_workflow(own())
        assert made.name in [spec.name for spec in await client.workflows()]
        assert await client.workflow(named(made)) == made
        for workflow, spec in (("own", made), (named(made), made), ("two-pass", None)):
            assert await promised(client, workflow) == named(spec or shipped()[workflow])
        newer = await client.register_workflow(own(steps=8))
        assert newer.digest != made.digest and await client.workflow("own") == newer
        assert await client.register_workflow(own(steps=9), only_check=True) != newer
        assert await client.workflow("own") == newer
        assert await promised(client, "own") == named(newer)
        broken = own()
        broken.nodes[0].op, broken.output = "sing", "x.y"
        with pytest.raises(InvalidRequest) as caught:
            await client.register_workflow(broken)
        assert {v.field for v in caught.value.violations} >= {"nodes[0].op", "output"}
        await client.delete_workflow("own")
        with pytest.raises(Refused) as gone:
            await client.delete_workflow("own")
        assert gone.value.reason == "UNKNOWN_WORKFLOW"
        assert "spec.workflow" in await wrong(client, workflow="own")


async def test_inputs_are_uploaded_and_belong_to_their_tenant(
    bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path
) -> None:
    async with mesh(bus, subjects, nats_url, tmp_path) as stage:
        client, content = stage.client, saved(red("L"), "PNG")
        stored = await client.put_input(content, tenant="acme")
        assert (stored.width, stored.height) == (6, 4)
        assert list(stored.conversions) == ["greyscale to RGB"]
        assert 0.4 * KEPT_S * 1e6 < stored.kept_us <= KEPT_S * 1e6
        bucket = await bus.jetstream.object_store(subjects.input_bucket)
        kept = await bucket.get(input_object("acme", stored.name))  # to its digest
        assert kept.data is not None and Image.open(io.BytesIO(kept.data)).size == (6, 4)
        messages = (await bus.jetstream.stream_info(f"OBJ_{subjects.input_bucket}")).state.messages
        file = tmp_path / "photo.png"
        file.write_bytes(content)
        assert (await client.put_input(file, tenant="acme")).name == stored.name
        state = (await bus.jetstream.stream_info(f"OBJ_{subjects.input_bucket}")).state
        assert state.messages == messages, "what is there is not stored again"
        asked = {"workflow": "img2img", "inputs": {"image": stored.name}}
        made = await client.create("a fox", tenant="acme", **asked)  # type: ignore[arg-type]
        assert made.metadata.accepted.effective_spec.inputs["image"] == stored.name
        theirs = await wrong(client, tenant="other", **asked)
        assert "that this tenant uploaded" in theirs["spec.inputs[image]"]
        mask = await client.put_input(content, tenant="acme", mask=True)
        assert mask.name != stored.name and not mask.conversions
        with pytest.raises(InvalidRequest, match="begins with b'hello'"):
            await client.put_input(b"hello")
        with pytest.raises(InvalidRequest, match="can be read"):
            await client.put_input(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("pieces", "field", "told"),
    [
        ([], "header", "an empty stream"),
        ([PutInputRequest(data=b"x")], "header", "the first message has the header"),
        ([{"sha256": "x"}], "header.sha256", "64 hex digits"),
        ([{"size_bytes": 1 << 30}], "header.size_bytes", "at most 67108864"),
        ([{}, {}], "data", "another header"),
        ([{}, PutInputRequest(data=b"x" * ((256 << 10) + 1))], "data", "262144 each"),
        ([{"size_bytes": 3}, PutInputRequest(data=b"x")], "data", "3, as the header says"),
        ([{"sha256": "0" * 64}, PutInputRequest(data=b"x")], "header.sha256", "of what came"),
        ([{}, *[PutInputRequest(data=b"x" * (256 << 10))] * 257], "data", "at most 67108864"),
    ],
)
async def test_uploads_that_make_no_sense(
    staged: Staging, pieces: list[object], field: str, told: str
) -> None:
    async def said() -> AsyncIterator[PutInputRequest]:
        for piece in pieces:
            if isinstance(piece, PutInputRequest):
                yield piece
            else:
                assert isinstance(piece, dict)
                yield PutInputRequest(header=InputHeader(**piece))

    async with (
        staged(None, workers=()) as stage,
        grpc.aio.insecure_channel(stage.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await GenerationServiceStub(channel).PutInput(said())
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest), error
    assert [violation.field for violation in error.violations] == [field]
    assert told in error.violations[0].description


async def test_uploads_without_a_store_and_without_an_end(staged: Staging) -> None:
    async def for_ever() -> AsyncIterator[PutInputRequest]:
        yield PutInputRequest(header=InputHeader())
        await asyncio.Event().wait()

    async with staged(None, workers=(), upload_s=0.2) as stage:
        async with grpc.aio.insecure_channel(stage.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await GenerationServiceStub(channel).PutInput(for_ever())
        slow = from_rpc_error(caught.value)
        assert slow.reason == "CALLER_TOO_SLOW"
        async with grpc.aio.insecure_channel(stage.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                stub = GenerationServiceStub(channel)
                whole = PutInputRequest(data=saved(red(), "PNG"))
                await stub.PutInput(iter((PutInputRequest(header=InputHeader()), whole)))
        assert "store of inputs" in str(from_rpc_error(caught.value))


async def test_keys_say_who_registers_and_whose_an_upload_is(
    bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    _, plain = api_keys.add(file, "acme")
    _, operator = api_keys.add(file, "house", operator=True)
    async with mesh(bus, subjects, nats_url, tmp_path, api_keys=file) as stage:
        for call in (stage.client.workflows(), stage.client.put_input(saved(red(), "PNG"))):
            with pytest.raises(NotAuthenticated):
                await call
        async with HocketClient(stage.address, api_key=plain) as acme:
            assert [spec.name for spec in await acme.workflows()] == sorted(shipped())
            for change in (acme.register_workflow(own()), acme.delete_workflow("own")):
                with pytest.raises(AccessDenied, match="acme"):
                    await change
            assert (await acme.register_workflow(own(), only_check=True)).digest
            stored = await acme.put_input(saved(red(), "PNG"))
            bucket = await bus.jetstream.object_store(subjects.input_bucket)
            assert (await bucket.get_info(input_object("acme", stored.name))).size
            with pytest.raises(AccessDenied, match="other"):
                await acme.put_input(saved(red(), "PNG"), tenant="other")
        async with HocketClient(stage.address, api_key=operator) as house:
            assert (await house.register_workflow(own())).digest
            await house.delete_workflow("own")


async def test_the_commands(bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path) -> None:
    photo, mask = tmp_path / "photo.jpg", tmp_path / "mask.png"
    photo.write_bytes(saved(red(size=(64, 64)), "JPEG"))
    mask.write_bytes(saved(red("L", (64, 64)), "PNG"))
    async with mesh(bus, subjects, nats_url, tmp_path) as stage:
        status, told = await stage.hocket("workflows", "show", "inpaint", "--as", "json")
        assert status == 0
        file = tmp_path / "mine.json"
        file.write_text(told.replace('"inpaint"', '"mine"'))
        status, told = await stage.hocket("workflows", "register", str(file))
        assert status == 0 and told.startswith("registered mine@"), told
        status, told = await stage.hocket("workflows", "list")
        assert status == 0 and "mine" in told and "upscale-twice" in told and "image mask" in told
        status, told = await stage.hocket("workflows", "show", "mine")
        assert status == 0 and "mask: mask  load_mask" in told and "$mask: FILE" in told
        status, told = await stage.hocket("workflows", "show", "mine", "--as", "mermaid")
        assert status == 0 and told.startswith("flowchart TD")
        asked = ("generate", "a fox", "--workflow", "mine", "--detach")
        status, told = await stage.hocket(*asked)
        assert status == 1 and "spec.inputs[image]: found nothing" in told
        brought = ("--input", f"image={photo}", "--input", f"mask={mask}")
        status, told = await stage.hocket(*asked, *brought)
        assert status == 0, told
        made = await stage.client.get(told.split()[-1])
        assert made.metadata.accepted.effective_spec.workflow.startswith("mine@")
        assert "image: 64x64" in told and "mask: 64x64" in told
        status, told = await stage.hocket(*asked, "--input", f"image={OTHER}", *brought[2:])
        assert status == 1 and "found sha256:bbb" in " ".join(told.split())
        status, told = await stage.hocket("generate", "a fox", *brought[:2])
        assert status == 1 and "--workflow" in told
        status, told = await stage.hocket(*asked, "--input", "image")
        assert status == 1 and "NAME=FILE" in told
        status, told = await stage.hocket("workflows", "delete", "mine")
        assert status == 0 and "deleted mine" in told
        status, told = await stage.hocket("workflows", "show", "mine")
        assert status == 1 and "UNKNOWN_WORKFLOW" in told
    file.write_text(told)
    result = await asyncio.to_thread(CliRunner().invoke, app, ["workflows", "check", str(file)])
    assert result.exit_code == 1 and "allowed: JSON" in result.output
