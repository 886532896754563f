"""The whole mesh on one machine: nats-server, control, workers and gateway as child processes, of
each but the workers as many replicas as wanted.

    nats-server --> control --> workers, gateway --> every worker alive, gateway SERVING: ready
    then: what dies is started again, on its port, with its files, until it has died too often
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import grpc
import nats
import nats.errors

from hocket.client import HocketClient
from hocket.errors import MeshStopped, NotReady
from hocket.launching import endpoints
from hocket.launching.broker import clustered, free_port, nats_server_command
from hocket.launching.children import Child, Children, stop_leftovers
from hocket.launching.restarts import DEFAULT, RestartRule
from hocket.rpc.channels import CHANNEL_OPTIONS
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
_DRAIN_S = 1.0  # control has stopped by then: nobody takes latents over


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
    roles: tuple[tuple[str, ...], ...] = ()  # of each pool: what it loads; empty: everything
    executor: str = ""  # empty: the worker's default
    profile: str = ""  # CSV by which emulated workers sleep
    batch_max: int = 0  # jobs of one shape that a worker takes at a time; 0: the worker's default
    log_level: str = "info"
    controls: int = 1  # replicas of control: one leads, the others stand by
    gateways: int = 1
    brokers: int = 1  # more than one: a cluster
    pools: int = 1  # worker processes are started by so many parents, as on so many hosts
    monitors: bool = False  # each broker of our own serves its figures over HTTP
    restarts: RestartRule = DEFAULT  # when what died is started again


@dataclass(frozen=True)
class RunningMesh:
    """A mesh that is ready."""

    gateway: str  # "host:port"; the first one's
    control: str  # the replica's that announced itself last
    nats_url: str  # of several brokers all, with commas between
    children: Children
    gateways: tuple[str, ...] = ()  # all of them
    monitors: tuple[str, ...] = ()  # HTTP doors of the brokers, where wanted


@asynccontextmanager
async def mesh(plan: MeshPlan, report: Report) -> AsyncIterator[RunningMesh]:
    """Starts a mesh, gives it when it is ready, and leaves no process behind.

    Raises MeshStopped when a part does not start, with the end of its log.
    """
    plan.state_dir.mkdir(parents=True, exist_ok=True)
    with _locked(plan.state_dir):
        await stop_leftovers(plan.state_dir, report)
        for service in ("control", "gateway"):
            endpoints.clear(plan.state_dir, service)
        async with AsyncExitStack() as stack:
            children = Children(plan.state_dir, report, plan.restarts)
            stack.push_async_callback(children.stop)
            doors = tuple(free_port() for _ in range(plan.brokers)) if plan.monitors else ()
            url = plan.nats_url or await _start_brokers(plan, children, report, doors)
            control = await _start_controls(plan, url, children, report)
            pools = await _start_workers(plan, url, children)
            gateways = await _start_gateways(plan, url, children, report)
            await _until_alive(plan, control, pools, report)
            await asyncio.gather(*(_until_serving(address) for address in gateways))
            children.supervise()
            monitors = tuple(f"http://127.0.0.1:{port}" for port in doors)
            yield RunningMesh(gateways[0], control, url, children, gateways, monitors)


async def _until_serving(gateway: str) -> None:
    """Returns once a gateway has heard of the workers, too."""
    async with HocketClient(gateway) as client, asyncio.timeout(_SERVICE_START_S):
        while True:
            with suppress(NotReady):
                known = await client.models(wait_for_ready=True)
                if any(model.workers or not model.HasField("workers") for model in known):
                    return
            await asyncio.sleep(_POLL_S)


async def _start_brokers(
    plan: MeshPlan, children: Children, report: Report, monitors: Sequence[int]
) -> str:
    ports = [free_port() for _ in range(plan.brokers)]
    routes = [free_port() for _ in ports]
    started = []
    for index, port in enumerate(ports):
        command = nats_server_command(plan.state_dir / _numbered("nats", index), port)
        if plan.brokers > 1:
            command = clustered(command, plan.cluster, routes, index)
        if monitors:
            command += ["-m", str(monitors[index])]
        name = _numbered("nats", index)
        started.append(await children.start(name, command, stop_rank=3))
    for child, port in zip(started, ports, strict=True):
        await _until(child, partial(_listens, port), "nats-server")
        report(f"nats-server  127.0.0.1:{port}")
    url = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    if plan.brokers > 1:
        await _until(started[0], partial(_has_leader, url.split(",")[0]), "the brokers' cluster")
    return url


async def _start_controls(plan: MeshPlan, url: str, children: Children, report: Report) -> str:
    """Starts the replicas; the address of the first to announce itself."""
    options = [f"--policy={plan.policy}"] if plan.policy else []
    slow = "control      still starting; the first start compiles the planner, 10 to 30 s"
    teller = asyncio.get_running_loop().call_later(_CONTROL_SLOW_S, report, slow)
    try:
        for index in range(plan.controls):
            listen = f"--listen=127.0.0.1:{free_port()}"
            command = _service("control", plan, url, [*options, listen])
            child = await children.start(_numbered("control", index), command, stop_rank=1)
            if index == 0:  # it also compiles what the others then find compiled
                address = await _announced(plan, child, "control", _CONTROL_START_S)
            else:
                await _announced(plan, child, "control", pid=child.process.pid)
    finally:
        teller.cancel()
    standing_by = f", {plan.controls - 1} standing by" if plan.controls > 1 else ""
    report(f"control      {address}{standing_by}")
    return address


async def _start_workers(plan: MeshPlan, url: str, children: Children) -> list[Child]:
    pools = []
    for index in range(plan.pools):
        command = _service("gpuworker", plan, url, worker_options(plan, index))
        pools.append(await children.start(_numbered("workers", index), command, stop_rank=2))
    return pools


def worker_options(plan: MeshPlan, pool: int = 0) -> list[str]:
    """What a pool of workers is told of a plan; the rest is the workers' default."""
    first, behind = (plan.workers * index // plan.pools for index in (pool, pool + 1))
    options = [
        f"--count={behind - first}",
        f"--first-index={first}",
        "--name-prefix=w",
        f"--drain-s={_DRAIN_S}",
    ]
    options += [f"--model={model}" for model in plan.models]
    options += [f"--role={role}" for role in (plan.roles[pool] if plan.roles else ())]
    if plan.executor:
        options.append(f"--executor={plan.executor}")
    if plan.profile:
        options.append(f"--profile={plan.profile}")
    if plan.batch_max:
        options.append(f"--batch-max={plan.batch_max}")
    return options


async def _start_gateways(
    plan: MeshPlan, url: str, children: Children, report: Report
) -> tuple[str, ...]:
    host, _, port = plan.listen.rpartition(":")
    addresses = []
    for index in range(plan.gateways):
        own = port if index == 0 and port != "0" else free_port()
        options = [f"--listen={host}:{own}", f"--grace-s={_GATEWAY_GRACE_S}"]
        command = _service("gateway", plan, url, options)
        child = await children.start(_numbered("gateway", index), command, stop_rank=0)
        addresses.append(await _announced(plan, child, "gateway", pid=child.process.pid))
        report(f"gateway      {addresses[-1]}")
    return tuple(addresses)


def _numbered(name: str, index: int) -> str:
    """Name of a replica: the first one has none but its service's."""
    return f"{name}-{index + 1}" if index else name


def _service(module: str, plan: MeshPlan, url: str, options: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", module),
        f"--cluster={plan.cluster}",
        f"--nats-url={url}",
        f"--state-dir={plan.state_dir}",
        f"--log-level={plan.log_level}",
        *options,
    ]


async def _until_alive(
    plan: MeshPlan, control: str, pools: Sequence[Child], report: Report
) -> None:
    """Returns once every worker's lease is alive."""
    async with grpc.aio.insecure_channel(control, options=CHANNEL_OPTIONS) as channel:
        stub: ControlServiceAsyncStub = ControlServiceStub(channel)
        watch = asyncio.ensure_future(_count_workers(stub, plan.workers, report))
        deaths = {asyncio.ensure_future(pool.process.wait()): pool for pool in pools}
        try:
            done, _ = await asyncio.wait(
                (watch, *deaths), timeout=_WORKERS_START_S, return_when=asyncio.FIRST_COMPLETED
            )
            if watch in done:
                watch.result()
                return
            pool = next((deaths[task] for task in deaths if task in done), pools[0])
            why = "stopped" if done else f"are not alive after {_WORKERS_START_S:.0f} s"
            raise MeshStopped(f"the workers {why}\n{pool.log_tail()}")
        except grpc.aio.AioRpcError as error:
            raise MeshStopped(f"control does not answer: {error.details()}") from error
        finally:
            for task in (watch, *deaths):
                task.cancel()
            await asyncio.gather(watch, *deaths, return_exceptions=True)


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
    plan: MeshPlan,
    child: Child,
    service: str,
    limit_s: float = _SERVICE_START_S,
    pid: int = 0,
) -> str:
    """Address of a service once it has announced itself; of that process, where one is named,
    also if it stands by.
    """

    def doors() -> list[str]:
        known = endpoints.living(plan.state_dir, service, standing_by=bool(pid))
        return [one.address for one in known if pid in (0, one.pid)]

    async def known() -> bool:
        return bool(doors())

    await _until(child, known, service, limit_s)
    return doors()[0]


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


async def _has_leader(url: str) -> bool:
    """Whether the brokers of a cluster have agreed on who keeps the streams."""
    try:
        client = await nats.connect(url, connect_timeout=2, allow_reconnect=False)
    except (OSError, nats.errors.Error):
        return False
    try:
        told = await client.request("$JS.API.INFO", b"", timeout=1.0)
        return b'"error"' not in told.data
    except nats.errors.Error:
        return False
    finally:
        await client.close()


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
