"""Three hosts on one machine: network namespaces on a bridge of their own.

    host a --+
    host b --+-- bridge, in a namespace of its own: no packet leaves the three
    host c --+

Each host has a name, an address and a hosts file by which names like `broker` are found. Needs root
(CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2; `possible` says so. Nothing outside is touched but
/run/netns and /etc/netns, where everything carries this process's number and goes in the end.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_NETWORK = "10.77.0"
_HOSTS_FILES = Path("/etc/netns")
_NAME_IT = 'hostname "$0" && exec "$@"'
_STOP_S = 15.0


@dataclass
class Host:
    """One host."""

    name: str
    address: str
    namespace: str
    folder: Path  # its processes' working directory
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def start(self, name: str, command: Sequence[str]) -> asyncio.subprocess.Process:
        """Starts a command on this host; its output goes to `<folder>/<name>.log`."""
        environment = {**os.environ, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self.entered(command),
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def entered(self, command: Sequence[str]) -> list[str]:
        """The command, run on this host, under this host's name."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*inside, "sh", "-c", _NAME_IT, self.name, *command]

    def connect(self, linked: bool) -> None:
        """Plugs the host's cable in or out; its processes go on either way."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up" if linked else "down")

    async def crash(self) -> None:
        """Ends every process of the host at once, as a power cut does."""
        for pid in _pids(self.namespace):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            await process.wait()
        self.processes.clear()

    async def stop(self) -> None:
        """SIGTERM to all that was started here, and SIGKILL to what does not stop."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                for process in self.processes.values():
                    await process.wait()
        except TimeoutError:
            pass
        await self.crash()

    def log_tail(self, name: str, lines: int = 15) -> str:
        """The end of what one of its processes wrote."""
        path = self.folder / f"{name}.log"
        text = path.read_text(errors="replace") if path.exists() else "(no log)"
        return "\n".join(f"{self.name} {name} | {line}" for line in text.splitlines()[-lines:])


def possible() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"hocket-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return False
    entered = ["ip", "netns", "exec", name, "unshare", "--uts", "true"]
    works = subprocess.run(entered, capture_output=True, check=False).returncode == 0
    _ip("netns", "del", name)
    return works


@contextmanager
def hosts(folder: Path, names: Sequence[str], aliases: dict[str, str]) -> Iterator[dict[str, Host]]:
    """Hosts by name, linked to each other. `aliases` are further names: alias -> host.

    Raises CalledProcessError where namespaces cannot be made.
    """
    prefix = f"hocket-{os.getpid()}"
    switch = f"{prefix}-switch"
    found: dict[str, Host] = {}
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, 1):
            own = folder / name
            own.mkdir(parents=True)
            host = Host(name, f"{_NETWORK}.{number}", f"{prefix}-{name}", own)
            _link(host, switch, number)
            found[name] = host
        for host in found.values():
            _write_hosts_file(host, found, aliases)
        yield found
    finally:
        for name in names:
            namespace = f"{prefix}-{name}"
            for pid in _pids(namespace):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
            shutil.rmtree(_HOSTS_FILES / namespace, ignore_errors=True)
        subprocess.run(["ip", "netns", "del", switch], capture_output=True, check=False)
        with suppress(OSError):
            _HOSTS_FILES.rmdir()  # only where nobody else keeps something there


def _link(host: Host, switch: str, number: int) -> None:
    _ip("netns", "add", host.namespace)
    cable = f"port{number}"
    peer = ("peer", "name", "eth0", "netns", host.namespace)
    _ip("-n", switch, "link", "add", cable, "type", "veth", *peer)
    _ip("-n", switch, "link", "set", cable, "master", "br0", "up")
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    host.connect(True)


def _write_hosts_file(host: Host, found: dict[str, Host], aliases: dict[str, str]) -> None:
    own = _HOSTS_FILES / host.namespace
    own.mkdir(parents=True)
    lines = ["127.0.0.1 localhost"]
    lines += [f"{other.address} {other.name}" for other in found.values()]
    lines += [f"{found[name].address} {alias}" for alias, name in aliases.items()]
    (own / "hosts").write_text("\n".join(lines) + "\n")


def _pids(namespace: str) -> list[int]:
    told = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    )
    return [int(text) for text in told.stdout.split()]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
