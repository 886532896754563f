"""What the commands of `hocket` share: settings, finding the mesh, telling errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import grpc
import typer
from rich.console import Console

from hocket.client import HocketClient
from hocket.config import Common, load_or_exit
from hocket.errors import (
    HocketError,
    InvalidRequest,
    NoMesh,
    NotReady,
    WrongConfig,
    from_rpc_error,
)
from hocket.launching import endpoints
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.security.identity import Identity, open_channel
from hocket.v1.control_pb2 import WatchClusterRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only

T = TypeVar("T")

console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="State folder of the mesh (default: ./state).")
]
Address = Annotated[
    str | None, typer.Option("--address", help="host:port of a gateway (default: the local one).")
]
Control = Annotated[
    str | None, typer.Option("--control", help="host:port of control (default: the local one).")
]
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h)?")
_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LEADS_S = 2.0
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class CommandSettings(Common, frozen=True, kw_only=True):
    """Settings of the command line itself."""

    section: ClassVar[str] = "hocket"

    address: str = ""  # of a gateway; empty: one that the state folder names
    control: str = ""  # of control; empty: the one that leads
    api_key: str = ""  # HOCKET_API_KEY, where gateways ask for one
    tls_ca: Path | None = None  # checks gateways; with tls_dir that folder's own


def settings(
    state_dir: Path | None, address: str | None = None, control: str | None = None
) -> CommandSettings:
    """The command line's settings from its options, HOCKET_* and the settings file."""
    options = {"state_dir": state_dir, "address": address, "control": control}
    return load_or_exit(CommandSettings, options)


def client_of(found: CommandSettings, provider: TracerProvider | None = None) -> HocketClient:
    """A client of the gateway that the settings name, with what it is to be shown."""
    return HocketClient(
        gateway_address(found),
        tracer_provider=provider,
        api_key=found.api_key,
        tls_ca=found.tls_ca,
        tls_dir=found.tls_dir,
    )


def gateway_address(found: CommandSettings) -> str:
    """Where gateways listen, with commas; raises NoMesh with what to do when there is none."""
    if found.address:
        return found.address
    known = endpoints.living(found.state_dir, "gateway")
    addresses = ",".join(one.address for one in known)
    return addresses or _announced(found.state_dir, "gateway", "--address")


@asynccontextmanager
async def control_of(found: CommandSettings) -> AsyncIterator[ControlServiceAsyncStub]:
    """A stub of the replica that leads, while the block runs; its statuses become typed errors."""
    address = found.control or await _leading(found)
    identity = Identity.load(found.tls_dir)
    async with open_channel(address, CHANNEL_OPTIONS, identity, "control") as channel:
        try:
            yield ControlServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command; a typed error is told in a line and ends it with status 1."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except HocketError as error:
        tell(error)
        raise typer.Exit(1) from None


def tell(error: HocketError) -> None:
    """An error in words for people."""
    if isinstance(error, InvalidRequest):
        complaints.print("[red]invalid request:[/red]")
        for violation in error.violations:
            complaints.print(f"  {violation.field}: {violation.description}", markup=False)
        return
    complaints.print(f"[red]{error.reason}[/red]", end=": ")
    complaints.print(str(error), markup=False)
    if wait_us := getattr(error, "retry_after_us", 0):
        complaints.print(f"retry after {wait_us / 1e6:.1f} s")


def seconds(option: str, text: str) -> float:
    """A duration such as "5s", "500ms", "2m" or "5" in seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise WrongConfig(option, text, "a number with us, ms, s, m or h")
    return float(match[1]) * _UNIT_S[match[2] or "s"]


def pixels(option: str, text: str) -> tuple[int, int]:
    """A size such as "128x128"."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise WrongConfig(option, text, "WIDTHxHEIGHT, small, medium or large")
    return int(match[1]), int(match[2])


async def _leading(found: CommandSettings) -> str:
    """Address of the control replica that answers; of several only the leader does."""
    known = endpoints.living(found.state_dir, "control")
    replicas = endpoints.living(found.state_dir, "control", standing_by=True)
    if replicas and not known:
        raise NotReady(_nobody_leads(replicas))
    only = _announced(found.state_dir, "control", "--control")
    identity = Identity.load(found.tls_dir)
    if len(known) < 2:
        return only
    for one in known:
        async with open_channel(one.address, CHANNEL_OPTIONS, identity, "control") as channel:
            stub: ControlServiceAsyncStub = ControlServiceStub(channel)
            try:
                async for _ in stub.WatchCluster(WatchClusterRequest(), timeout=_LEADS_S):
                    return one.address
            except grpc.aio.AioRpcError:
                continue  # stands by, or is about to end
    raise NotReady(_nobody_leads(replicas))


def _nobody_leads(replicas: Sequence[endpoints.Endpoint]) -> str:
    where = ", ".join(f"{one.address} (pid {one.pid}, {one.role})" for one in replicas)
    return f"none of the control replicas here leads at the moment: {where}"


def _announced(state_dir: Path, service: str, option: str) -> str:
    found = endpoints.find(state_dir, service)
    if found is None:
        raise NoMesh(
            f"no {service} is running here ({state_dir} names none): run `hocket up`, "
            f"or give {option}"
        )
    return found.address
