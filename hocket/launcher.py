"""The whole mesh on one machine: nats-server, control, workers and gateway as child processes.

    nats-server --> control --> workers, gateway --> every worker alive, gateway SERVING: ready
    stop: gateway, control, workers, nats-server, each with a deadline and then SIGKILL

Each child leads a process group of its own, so that Ctrl-C reaches only the launcher, which then
stops them in order. A lock on `<state_dir>/mesh.lock`, which the system takes back from a dead
launcher, keeps two meshes out of one folder; children that a killed launcher left behind are
stopped by the next one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import grpc

from hocket import endpoints
from hocket.broker import free_port, nats_server_command
from hocket.channels import CHANNEL_OPTIONS
from hocket.children import Child, Children, stop_leftovers
from hocket.errors import MeshStopped
from hocket.v1.control_pb2 import WatchClusterRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub

log = logging.getLogger(__name__)

Report = Callable[[str], None]
_POLL_S = 0.05
_SERVICE_START_S = 60.0
_CONTROL_START_S = 300.0  # the first one compiles the planner
_CONTROL_SLOW_S = 4.0
_WORKERS_START_S = 300.0  # torch is imported, models are loaded
_GATEWAY_GRACE_S = 3.0


@dataclass(frozen=True)
class MeshPlan:
    """What to start."""

    state_dir: Path
    workers: int
    cluster: str = "local"
    policy: str = ""  # empty: control's default
    nats_url: str = ""  # empty: a broker of our own
    listen: str = "127.0.0.1:0"  # the gateway's door
    models: tuple[str, ...] = ()  # empty: the shipped one
    executor: str = ""  # empty: the worker's default
    profile: str = ""  # CSV by which emulated workers sleep
    batch_max: int = 0  # jobs of one shape that a worker takes at a time; 0: the worker's default
    log_level: str = "info"


@dataclass(frozen=True)
class RunningMesh:
    """A mesh that is ready."""

    gateway: str  # "host:port"
    control: str
    nats_url: str
    children: Children


@asynccontextmanager
async def mesh(plan: MeshPlan, report: Report) -> AsyncIterator[RunningMesh]:
    """Starts a mesh, gives it when it is ready, and leaves no process behind.

    Raises MeshStopped when a part does not start, with the end of its log.
    """
    plan.state_dir.mkdir(parents=True, exist_ok=True)
    with _locked(plan.state_dir):
        await stop_leftovers(plan.state_dir, report)
        for service in ("control", "gateway"):
            (plan.state_dir / f"{service}.json").unlink(missing_ok=True)
        async with AsyncExitStack() as stack:
            children = Children(plan.state_dir, report)
            stack.push_async_callback(children.stop)
            url = plan.nats_url or await _start_broker(plan, children, report)
            control = await _start_control(plan, url, children, report)
            pool = await _start_workers(plan, url, children)
            gateway = await _start_gateway(plan, url, children, report)
            await _until_alive(plan, control, pool, report)
            yield RunningMesh(gateway, control, url, children)


async def _start_broker(plan: MeshPlan, children: Children, report: Report) -> str:
    port = free_port()
    store = plan.state_dir / "nats"
    child = await children.start("nats", nats_server_command(store, port), stop_rank=3)
    await _until(child, lambda: _listens(port), "nats-server")
    report(f"nats-server  127.0.0.1:{port}")
    return f"nats://127.0.0.1:{port}"


async def _start_control(plan: MeshPlan, url: str, children: Children, report: Report) -> str:
    options = [f"--policy={plan.policy}"] if plan.policy else []
    child = await children.start("control", _service("control", plan, url, options), stop_rank=1)
    slow = "control      still starting; the first start compiles the planner, 10 to 30 s"
    teller = asyncio.get_running_loop().call_later(_CONTROL_SLOW_S, report, slow)
    try:
        address = await _announced(plan, child, "control", _CONTROL_START_S)
    finally:
        teller.cancel()
    report(f"control      {address}")
    return address


async def _start_workers(plan: MeshPlan, url: str, children: Children) -> Child:
    command = _service("gpuworker", plan, url, worker_options(plan))
    return await children.start("workers", command, stop_rank=2, vital=False)


def worker_options(plan: MeshPlan) -> list[str]:
    """What the workers' command is told of a plan; the rest is the workers' default."""
    options = [f"--count={plan.workers}", *(f"--model={model}" for model in plan.models)]
    if plan.executor:
        options.append(f"--executor={plan.executor}")
    if plan.profile:
        options.append(f"--profile={plan.profile}")
    if plan.batch_max:
        options.append(f"--batch-max={plan.batch_max}")
    return options


async def _start_gateway(plan: MeshPlan, url: str, children: Children, report: Report) -> str:
    options = [f"--listen={plan.listen}", f"--grace-s={_GATEWAY_GRACE_S}"]
    child = await children.start("gateway", _service("gateway", plan, url, options), stop_rank=0)
    address = await _announced(plan, child, "gateway")
    report(f"gateway      {address}")
    return address


def _service(module: str, plan: MeshPlan, url: str, options: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", module),
        f"--cluster={plan.cluster}",
        f"--nats-url={url}",
        f"--state-dir={plan.state_dir}",
        f"--log-level={plan.log_level}",
        *options,
    ]


async def _until_alive(plan: MeshPlan, control: str, pool: Child, report: Report) -> None:
    """Returns once every worker's lease is alive."""
    async with grpc.aio.insecure_channel(control, options=CHANNEL_OPTIONS) as channel:
        stub: ControlServiceAsyncStub = ControlServiceStub(channel)
        watch = asyncio.ensure_future(_count_workers(stub, plan.workers, report))
        died = asyncio.ensure_future(pool.process.wait())
        try:
            done, _ = await asyncio.wait(
                (watch, died), timeout=_WORKERS_START_S, return_when=asyncio.FIRST_COMPLETED
            )
            if watch in done:
                watch.result()
                return
            why = "stopped" if died in done else f"are not alive after {_WORKERS_START_S:.0f} s"
            raise MeshStopped(f"the workers {why}\n{pool.log_tail()}")
        except grpc.aio.AioRpcError as error:
            raise MeshStopped(f"control does not answer: {error.details()}") from error
        finally:
            watch.cancel()
            died.cancel()
            await asyncio.gather(watch, died, return_exceptions=True)


async def _count_workers(stub: ControlServiceAsyncStub, wanted: int, report: Report) -> None:
    seen: set[str] = set()
    async for state in stub.WatchCluster(WatchClusterRequest(), wait_for_ready=True):
        for worker in state.workers:
            if worker.name not in seen:
                seen.add(worker.name)
                report(f"worker {worker.name}    {worker.device}  ({len(seen)} of {wanted})")
        if len(state.workers) >= wanted:
            return


async def _announced(
    plan: MeshPlan, child: Child, service: str, limit_s: float = _SERVICE_START_S
) -> str:
    async def known() -> bool:
        return endpoints.find(plan.state_dir, service) is not None

    await _until(child, known, service, limit_s)
    found = endpoints.find(plan.state_dir, service)
    assert found is not None, "just seen"
    return found.address


async def _until(
    child: Child,
    ready: Callable[[], Awaitable[bool]],
    what: str,
    limit_s: float = _SERVICE_START_S,
) -> None:
    """Polls until `ready`; raises MeshStopped when the child dies or takes too long."""
    try:
        async with asyncio.timeout(limit_s):
            while not await ready():
                if child.process.returncode is not None:
                    raise MeshStopped(f"{what} did not start\n{child.log_tail()}")
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        told = f"{what} is not ready after {limit_s:.0f} s\n{child.log_tail()}"
        raise MeshStopped(told) from None


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    file: IO[str] = (state_dir / "mesh.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        found = endpoints.find(state_dir, "gateway")
        where = f" (its gateway: {found.address})" if found is not None else ""
        told = f"a mesh is running in {state_dir}{where}: stop it, or give another --state-dir"
        raise MeshStopped(told) from None
    with file:
        yield
