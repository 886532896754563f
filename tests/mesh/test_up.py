"""`hocket up` as a user runs it: ready, used, Ctrl-C, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from hocket.client import HocketClient
from hocket.launching import endpoints
from tests.waiting import alive

WAIT_S = 120.0


async def test_ctrl_c_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    up = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "hocket.cli",
        "up",
        "--workers=2",
        f"--state-dir={tmp_path}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert up.stdout is not None
    async with asyncio.timeout(WAIT_S):
        while b"ready" not in (line := await up.stdout.readline()):
            assert line, "it ended before it was ready"
    children = json.loads((tmp_path / "mesh.json").read_text())
    pids = [child["pid"] for child in children]
    pids += [announced(tmp_path, f"w{index}").pid for index in range(2)]
    assert len(children) == 4 and all(alive(pid) for pid in pids)
    address = announced(tmp_path, "gateway").address
    await both_shipped_models_draw(address)
    os.killpg(up.pid, signal.SIGINT)  # as the terminal does
    async with asyncio.timeout(WAIT_S):
        await up.communicate()
    assert up.returncode in (0, 130)
    assert not any(alive(pid) for pid in pids)
    assert not await listens(address)


def announced(state_dir: Path, service: str) -> endpoints.Endpoint:
    found = endpoints.find(state_dir, service)
    assert found is not None
    return found


async def both_shipped_models_draw(address: str) -> None:
    """Pictures where no model is named, clips by name; neither with further settings."""
    async with HocketClient(address) as client:
        known = await client.models()
        assert [model.name for model in known] == ["hocket-emoji", "hocket-emoji-motion"]
        picture, _ = await client.generate_media("a fox", steps=1)
        clip, how = await client.generate_media(
            "a fox bouncing", model="hocket-emoji-motion", steps=1
        )
    assert picture.startswith(b"\x89PNG")
    assert b"ftyp" in clip[:12] and (how.media.frames, how.media.fps) == (16, 8)


async def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True
