"""google.longrunning.Operations, CreateGeneration and GetMedia over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2 as lro
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.protobuf.duration_pb2 import Duration

from hocket.errors import (
    HocketError,
    InvalidRequest,
    NotFinished,
    RequestFailed,
    UnknownRequest,
    from_rpc_error,
    from_rpc_status,
)
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import (
    CreateGenerationRequest,
    Finished,
    GenerateRequest,
    GenerationMetadata,
    GenerationState,
    GetMediaRequest,
)
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.mesh_pb2 import Cancelled, RequestEvent
from hocket.v1.types_pb2 import Failure, GenerationSpec
from tests.gateway.conftest import Stage, Staging
from tests.gateway.peer import Peer, accepted, done, step
from tests.gateway.test_servicer import PICTURE, accept_only, finish

WANTED = CreateGenerationRequest(request=GenerateRequest(spec=GenerationSpec(prompt="a fox")))


@asynccontextmanager
async def doors(stage: Stage) -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of Operations and of GenerationService; statuses become typed errors."""
    async with grpc.aio.insecure_channel(stage.address) as channel:
        try:
            yield OperationsStub(channel), GenerationServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def metadata_of(operation: lro.Operation) -> GenerationMetadata:
    metadata = GenerationMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata


async def test_an_operation_from_its_creation_to_its_media(staged: Staging) -> None:
    async with staged(accept_only) as stage, doors(stage) as (operations, generation):
        operation = await generation.CreateGeneration(WANTED)
        name = operation.name.removeprefix("operations/")
        submit = stage.peer.submits[0]
        assert submit.request_id == name and submit.request.detached
        assert metadata_of(operation).state == GenerationState.GENERATION_STATE_PROMISED
        assert not operation.done and stage.peer.followers == {}
        await stage.peer.tell(name, step(1))
        now = await operations.GetOperation(lro.GetOperationRequest(name=operation.name))
        assert metadata_of(now).progress.step == 1 and not now.done
        with pytest.raises(NotFinished):
            async with doors(stage) as (_, other):
                await other.GetMedia(GetMediaRequest(request_id=name)).read()
        await stage.peer.tell(name, done(await stage.peer.store(name, PICTURE)))
        ended = await operations.WaitOperation(lro.WaitOperationRequest(name=operation.name))
        finished = Finished()
        assert ended.done and ended.response.Unpack(finished)
        assert finished.media.size_bytes == len(PICTURE)
        for offset in (0, 1, 200_000, len(PICTURE)):
            asked = GetMediaRequest(request_id=name, offset=offset)
            pieces = [answer.chunk async for answer in generation.GetMedia(asked)]
            assert b"".join(piece.data for piece in pieces) == PICTURE[offset:]
            assert pieces[0].info == finished.media and pieces[0].offset == offset


async def test_waiting_has_an_end(staged: Staging) -> None:
    async with staged(accept_only) as stage, doors(stage) as (operations, generation):
        operation = await generation.CreateGeneration(WANTED)
        asked = lro.WaitOperationRequest(name=operation.name, timeout=Duration(nanos=10_000_000))
        assert not (await operations.WaitOperation(asked)).done
        assert (await stage.peer.follows.get()).onlooker


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (RequestEvent(failed=Failure(reason="MODEL_ERROR", message="it broke")), "MODEL_ERROR"),
        (RequestEvent(cancelled=Cancelled(steps_done=3)), "CANCELLED"),
    ],
)
async def test_a_bad_end_is_a_status(staged: Staging, ending: RequestEvent, reason: str) -> None:
    async with staged(accept_only) as stage, doors(stage) as (operations, generation):
        operation = await generation.CreateGeneration(WANTED)
        await stage.peer.tell(operation.name.removeprefix("operations/"), ending)
        ended = await operations.GetOperation(lro.GetOperationRequest(name=operation.name))
        assert ended.done and from_rpc_status(ended.error).reason == reason


async def test_a_repeated_key_gives_the_first_operation(staged: Staging) -> None:
    async def repeat(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        first = peer.submits[0]
        if submit.request_id != first.request_id:
            await peer.tell(first.request_id, step(2))
        return accepted(first)

    async with staged(repeat) as stage, doors(stage) as (_, generation):
        first = await generation.CreateGeneration(WANTED)
        again = await generation.CreateGeneration(WANTED)
        assert again.name == first.name and metadata_of(again).progress.step == 2


ENDINGS = {
    "finished": RequestEvent(finished=Finished(latency_us=5)),
    "failed": RequestEvent(failed=Failure(reason="MODEL_ERROR", message="it broke")),
    "cancelled": RequestEvent(cancelled=Cancelled(steps_done=3)),
}


@pytest.mark.parametrize("ending", ["finished", "failed"])
async def test_a_repeated_key_of_what_has_ended_gives_the_ended_operation(
    staged: Staging, ending: str
) -> None:
    """As it ended, with its own id: not a refusal, and not one that never ends."""

    async def repeat(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        first = peer.submits[0]
        if submit.request_id == first.request_id:
            return accepted(first)
        event = ENDINGS[ending]
        await peer.tell(first.request_id, event)
        if ending == "finished":
            return SubmitResponse(request_id=first.request_id, already_finished=event.finished)
        answer = SubmitResponse(request_id=first.request_id, rejected=event.failed)
        answer.rejected.metadata["ended"] = "1"  # as control says that it had been promised
        return answer

    async with staged(repeat) as stage, doors(stage) as (_, generation):
        first = await generation.CreateGeneration(WANTED)
        assert not first.done
        again = await generation.CreateGeneration(WANTED)
    assert again.name == first.name and again.done
    if ending == "finished":
        finished = Finished()
        assert again.response.Unpack(finished) and finished.latency_us == 5
    else:
        assert from_rpc_status(again.error).reason == "MODEL_ERROR"


async def test_generate_with_the_key_of_what_failed_ends_as_that_did(staged: Staging) -> None:
    """It was promised, and failed: that is no refusal, which would be worth another try."""

    async def failed(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        rejected = Failure(reason="MODEL_ERROR", message="it broke", metadata={"ended": "1"})
        return SubmitResponse(request_id="0" * 26, rejected=rejected)

    async with staged(failed) as stage:
        with pytest.raises(RequestFailed) as caught:
            await stage.client.generate_media("a fox")
        assert (caught.value.reason, caught.value.metadata) == ("MODEL_ERROR", {})
        assert stage.peer.followers == {}


async def test_listing_by_state_and_page(staged: Staging) -> None:
    async with staged(accept_only) as stage, doors(stage) as (operations, generation):
        names = [(await generation.CreateGeneration(WANTED)).name for _ in range(5)]
        await stage.peer.tell(names[1].removeprefix("operations/"), step(1))
        page = await operations.ListOperations(lro.ListOperationsRequest(page_size=3))
        assert [operation.name for operation in page.operations] == names[:1:-1]
        rest = await operations.ListOperations(
            lro.ListOperationsRequest(page_size=3, page_token=page.next_page_token)
        )
        assert [operation.name for operation in rest.operations] == names[1::-1]
        assert rest.next_page_token == ""
        for asked in ("RUNNING", "state=RUNNING", 'state = "GENERATION_STATE_RUNNING"'):
            found = await operations.ListOperations(lro.ListOperationsRequest(filter=asked))
            assert [operation.name for operation in found.operations] == [names[1]]
        with pytest.raises(InvalidRequest, match="PROMISED, RUNNING, FINISHED"):
            async with doors(stage) as (other, _):
                await other.ListOperations(lro.ListOperationsRequest(filter="owner=me"))


async def test_cancel_and_delete_are_passed_on(staged: Staging) -> None:
    async with staged(finish) as stage, doors(stage) as (operations, _):
        await operations.CancelOperation(lro.CancelOperationRequest(name="operations/r1"))
        assert await stage.peer.cancels.get() == "r1"
        await operations.DeleteOperation(lro.DeleteOperationRequest(name="operations/r1"))
        assert stage.peer.deleted == ["r1"]


@pytest.mark.parametrize("name", ["operations/nobody", "nobody", "operations/", ""])
async def test_what_is_not_known_is_said(staged: Staging, name: str) -> None:
    async with staged(finish) as stage:
        kinds: type[HocketError] = UnknownRequest
        with pytest.raises(kinds):
            async with doors(stage) as (operations, _):
                await operations.GetOperation(lro.GetOperationRequest(name=name))
        with pytest.raises(kinds):
            async with doors(stage) as (operations, _):
                await operations.WaitOperation(lro.WaitOperationRequest(name=name))
