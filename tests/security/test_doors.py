"""gRPC doors with certificates: control lets roles in, a gateway shows who it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from control.entrance.roles import RoleCheck
from hocket.errors import AccessDenied, WrongConfig, status_code
from hocket.rpc.channels import CHANNEL_OPTIONS, SERVER_OPTIONS
from hocket.security.identity import Identity, add_port, is_loopback, open_channel
from hocket.v1 import control_pb2, control_pb2_grpc
from tests.security.conftest import identity


class _Answers(control_pb2_grpc.ControlServiceServicer):
    """Says yes to everything: what is tested stands before it."""

    async def Submit(self, request, context):
        return control_pb2.SubmitResponse()

    async def CancelRequest(self, request, context):
        return control_pb2.CancelRequestResponse()

    async def DrainWorker(self, request, context):
        return control_pb2.DrainWorkerResponse()

    async def GetRequest(self, request, context):
        return control_pb2.GetRequestResponse()

    async def ListRequests(self, request, context):
        return control_pb2.ListRequestsResponse()

    async def DeleteRequest(self, request, context):
        return control_pb2.DeleteRequestResponse()

    async def WatchCluster(self, request, context):
        yield control_pb2.WatchClusterResponse()

    async def Attach(self, request_iterator, context):
        yield control_pb2.AttachResponse()


METHODS = {
    "Submit": control_pb2.SubmitRequest,
    "CancelRequest": control_pb2.CancelRequestRequest,
    "DrainWorker": control_pb2.DrainWorkerRequest,
    "GetRequest": control_pb2.GetRequestRequest,
    "ListRequests": control_pb2.ListRequestsRequest,
    "DeleteRequest": control_pb2.DeleteRequestRequest,
    "WatchCluster": control_pb2.WatchClusterRequest,
    "Attach": control_pb2.AttachRequest,
}


@pytest.fixture
async def control(certificates: Path) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[RoleCheck()], options=SERVER_OPTIONS)
    control_pb2_grpc.add_ControlServiceServicer_to_server(_Answers(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = add_port(server, "127.0.0.1:0", identity(certificates, "control"), mutual=True)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def calls(address: str, who: Identity | None) -> dict[str, bool]:
    """Which methods a caller gets an answer from."""
    found = {}
    async with open_channel(address, CHANNEL_OPTIONS, who, "control") as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        for name, kind in METHODS.items():
            try:
                if name == "Attach":
                    call = stub.Attach(iter([kind()]), timeout=5)
                    found[name] = await call.read() is not grpc.aio.EOF
                elif name == "WatchCluster":
                    found[name] = await stub.WatchCluster(kind(), timeout=5).read() is not None
                else:
                    await getattr(stub, name)(kind(), timeout=5)
                    found[name] = True
            except grpc.aio.AioRpcError as error:
                refused = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
                assert error.code() in refused, (name, error)
                found[name] = False
    return found


@pytest.mark.parametrize("role", ["gateway", "operator", "worker", "client", "broker"])
async def test_each_role_tries_everything_at_control(
    control: str, certificates: Path, role: str
) -> None:
    may = {
        "gateway": set(METHODS) - {"DrainWorker"},
        "operator": set(METHODS),
    }.get(role, set())
    found = await calls(control, identity(certificates, role))
    assert found == {name: name in may for name in METHODS}


async def test_control_lets_nobody_in_without_the_clusters_certificate(
    control: str, strangers: Path
) -> None:
    for who in (None, identity(strangers, "gateway")):
        assert not any((await calls(control, who)).values())


async def test_a_client_refuses_a_service_of_another_role(control: str, certificates: Path) -> None:
    who = identity(certificates, "operator")
    async with open_channel(control, CHANNEL_OPTIONS, who, "gateway") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)


def test_a_folder_without_certificates_is_told(tmp_path: Path) -> None:
    assert Identity.load(None) is None
    with pytest.raises(WrongConfig, match="tls_dir"):
        Identity.load(tmp_path)


def test_denied_is_permission_denied() -> None:
    assert status_code(AccessDenied("a", "b")) is grpc.StatusCode.PERMISSION_DENIED


def test_what_listens_beyond_the_loopback() -> None:
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "127.0.0.1"):
        assert is_loopback(address)
    for address in ("0.0.0.0:1", "10.0.0.1:2", "[::]:1", "control:50052", "0.0.0.0", ":1"):
        assert not is_loopback(address)
