"""The commands for requests that live by themselves, against a gateway over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

from typer.testing import CliRunner

from hocket.cli.__main__ import app
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from tests.gateway.conftest import Stage, Staging
from tests.gateway.peer import Peer, accepted, done, step
from tests.gateway.proxy import proxied
from tests.gateway.test_servicer import PICTURE, accept_only


async def hocket(stage: Stage, *arguments: str, address: str = "") -> tuple[int, str]:
    told = [*arguments, "--address", address or stage.address, "--state-dir", str(stage.state_dir)]
    result = await asyncio.to_thread(CliRunner().invoke, app, told)
    return result.exit_code, result.output


async def test_detached_watched_listed_and_fetched(staged: Staging, tmp_path: Path) -> None:
    async with staged(accept_only) as stage:
        status, told = await hocket(stage, "generate", "a red fox", "--detach")
        name = told.strip()
        assert status == 0 and stage.peer.submits[0].request_id == name
        status, told = await hocket(stage, "ls")
        assert status == 0 and name in "".join(told.split()) and "promised" in told
        status, told = await hocket(stage, "result", name)
        assert status == 1 and "NOT_FINISHED" in told
        await stage.peer.tell(name, step(4), done(await stage.peer.store(name, PICTURE)))
        status, told = await hocket(stage, "watch", name)
        assert status == 0 and "dit step 4/4" in told and "took 0.80 s" in told
        file = tmp_path / "fox.png"
        status, told = await hocket(stage, "result", name, "-o", str(file), "--wait")
        assert status == 0 and file.read_bytes() == PICTURE
        status, told = await hocket(stage, "watch", "nobody")
        assert status == 1 and "UNKNOWN_REQUEST" in told


async def test_generate_survives_its_gateway(staged: Staging, tmp_path: Path) -> None:
    async def same_key(peer: Peer, submit: SubmitRequest) -> SubmitResponse:
        keys = [known.request.idempotency_key for known in peer.submits]
        return accepted(peer.submits[keys.index(submit.request.idempotency_key)])

    async with staged(same_key) as stage, proxied(stage.address) as first:
        file = tmp_path / "fox.png"
        addresses = f"{first.address},{stage.address}"
        asked = hocket(stage, "generate", "a fox", "-o", str(file), address=addresses)
        running = asyncio.ensure_future(asked)
        while not stage.peer.followers:  # noqa: ASYNC110  the command runs in a thread
            await asyncio.sleep(0.01)
        name = stage.peer.submits[0].request_id
        first.cut()
        await stage.peer.tell(name, done(await stage.peer.store(name, PICTURE)))
        status, told = await running
        assert status == 0, told
        assert file.read_bytes() == PICTURE
