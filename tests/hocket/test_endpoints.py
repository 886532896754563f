"""Endpoint files: found while their process lives, never taken from another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hocket import endpoints


def test_announce_find_withdraw(tmp_path: Path) -> None:
    assert endpoints.find(tmp_path, "gateway") is None
    endpoints.announce(tmp_path, "gateway", "127.0.0.1:7433")
    found = endpoints.find(tmp_path, "gateway")
    assert found == endpoints.Endpoint(address="127.0.0.1:7433", pid=os.getpid())
    endpoints.withdraw(tmp_path, "gateway")
    assert endpoints.find(tmp_path, "gateway") is None
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_is_nowhere(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hocket import endpoints;"
        "endpoints.announce(Path(sys.argv[1]), 'control', 'h:1')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert endpoints.read(tmp_path, "control") is not None
    assert endpoints.find(tmp_path, "control") is None
    endpoints.withdraw(tmp_path, "control")
    assert endpoints.read(tmp_path, "control") is not None, "not ours to withdraw"


def test_a_broken_file_is_no_endpoint(tmp_path: Path) -> None:
    (tmp_path / "gateway.json").write_text("{")
    assert endpoints.find(tmp_path, "gateway") is None
