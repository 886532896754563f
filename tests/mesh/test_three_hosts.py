"""Three hosts, which are network namespaces: the README's commands, a host lost, a partition."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.chaos.namespaces import hosts, possible
from bench.chaos.three_hosts import three_hosts

needs_root = pytest.mark.skipif(not possible(), reason="needs CAP_NET_ADMIN and iproute2")


def reaches(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@needs_root
def test_hosts_reach_each_other_until_a_cable_is_pulled(tmp_path: Path) -> None:
    code = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=2)"
    listen = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print(flush=True);"
    listen += "import signal; signal.pause()"
    with hosts(tmp_path, ("one", "two"), {"broker": "one"}) as named:
        one, two = named.values()
        server = subprocess.Popen(one.entered(["python3", "-c", listen]), stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"\n"
        asked = two.entered(["python3", "-c", code, "broker"])
        assert reaches(asked)
        one.connect(False)
        assert not reaches(asked)
        one.connect(True)
        assert reaches(asked)
        named_itself = subprocess.run(two.entered(["hostname"]), capture_output=True, text=True)
        assert named_itself.stdout == "two\n"
        namespaces = [host.namespace for host in named.values()]
    server.wait()
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert not any(name in left for name in namespaces)


@needs_root
@pytest.mark.full
@pytest.mark.timeout(600)
async def test_every_request_ends_well_on_three_hosts(tmp_path: Path) -> None:
    found = await three_hosts(tmp_path, print)
    assert found.problems == []
    assert any(line.startswith("a group across hosts") for line in found.lines)
