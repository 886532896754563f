"""Endpoint files: found while their process lives, never taken from another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hocket.launching import endpoints


def test_announce_find_withdraw(tmp_path: Path) -> None:
    assert endpoints.find(tmp_path, "gateway") is None
    endpoints.announce(tmp_path, "gateway", "127.0.0.1:7433")
    found = endpoints.find(tmp_path, "gateway")
    assert found == endpoints.Endpoint(address="127.0.0.1:7433", pid=os.getpid())
    endpoints.withdraw(tmp_path, "gateway")
    assert endpoints.find(tmp_path, "gateway") is None
    assert list(tmp_path.iterdir()) == []


ANNOUNCER = (
    "import sys; from pathlib import Path; from hocket.launching import endpoints;"
    "endpoints.announce(Path(sys.argv[1]), 'gateway', sys.argv[2]); print(flush=True);"
    "sys.stdin.read(); endpoints.withdraw(Path(sys.argv[1]), 'gateway')"
)


def announcer(folder: Path, address: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", ANNOUNCER, str(folder), address]
    started = subprocess.Popen(command, stdin=pipe, stdout=pipe)
    assert started.stdout is not None and started.stdout.readline()
    return started


def test_two_gateways_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """The first to stop takes only its own announcement back."""
    first, second = announcer(tmp_path, "h:1"), announcer(tmp_path, "h:2")
    assert {e.address for e in endpoints.living(tmp_path, "gateway")} == {"h:1", "h:2"}
    second.communicate(b"")
    found = endpoints.find(tmp_path, "gateway")
    assert found is not None and found.address == "h:1"
    first.kill()
    first.wait()
    assert endpoints.find(tmp_path, "gateway") is None


def test_a_dead_process_is_nowhere(tmp_path: Path) -> None:
    started = announcer(tmp_path, "h:1")
    started.kill()
    started.wait()
    assert endpoints.find(tmp_path, "gateway") is None
    assert len(list(tmp_path.iterdir())) == 1
    endpoints.announce(tmp_path, "gateway", "h:2")
    assert len(list(tmp_path.iterdir())) == 1, "the dead one's file is gone"


def test_services_whose_names_begin_alike_are_told_apart(tmp_path: Path) -> None:
    endpoints.announce(tmp_path, "w1", "h:1")
    endpoints.announce(tmp_path, "w11", "h:11")
    found = endpoints.find(tmp_path, "w1")
    assert found is not None and found.address == "h:1"
    endpoints.clear(tmp_path, "w1")
    assert endpoints.find(tmp_path, "w1") is None and endpoints.find(tmp_path, "w11") is not None


def test_who_stands_by_counts_only_where_it_is_asked_for(tmp_path: Path) -> None:
    endpoints.announce(tmp_path, "control", "h:1", endpoints.STANDBY)
    assert endpoints.find(tmp_path, "control") is None
    assert endpoints.living(tmp_path, "control") == ()
    (found,) = endpoints.living(tmp_path, "control", standing_by=True)
    assert (found.address, found.role) == ("h:1", "standby")
    endpoints.announce(tmp_path, "control", "h:1", "leader")
    assert endpoints.find(tmp_path, "control") == endpoints.living(tmp_path, "control")[0]


def test_a_broken_file_is_no_endpoint(tmp_path: Path) -> None:
    (tmp_path / "gateway@1.json").write_text("{")
    assert endpoints.find(tmp_path, "gateway") is None
