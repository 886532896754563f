"""A client that vanishes without a word: its process stands still, its connection stays open."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from control.config import ControlSettings
from hocket.rpc.channels import CHANNEL_OPTIONS, NOTICED_MS_MAX
from hocket.v1.control_pb2 import Leave
from tests.gateway.conftest import Staging
from tests.gateway.test_servicer import accept_only
from tests.waiting import WAIT_S

CALLER = """
import asyncio, sys
from hocket.client import HocketClient
async def call():
    async with HocketClient(sys.argv[1]) as client:
        async for event in client.generate("a fox"):
            print(event, flush=True)
asyncio.run(call())
"""


def test_a_gateway_that_stands_still_is_noticed_within_the_grace() -> None:
    """It used to take a client up to 15 s, while control waits 10 s for those who follow: a request
    whose gateway was stopped for half a minute was cancelled, and made again under its key.
    """
    options = dict(CHANNEL_OPTIONS)
    noticed_ms = options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"]
    assert noticed_ms == NOTICED_MS_MAX
    returns_us = 1000 * noticed_ms + 2_000_000  # over another gateway, by the second try
    assert returns_us < ControlSettings().follower_grace_us


async def test_a_caller_that_stands_still_is_missed(staged: Staging) -> None:
    """It used to keep its request alive for ever: nothing on its connection says that it is gone.

    Its follower is expected back for the grace, as any that went away.
    """
    async with staged(accept_only, keepalive_s=0.2) as stage, asyncio.timeout(WAIT_S):
        caller = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CALLER, stage.address), stdout=asyncio.subprocess.PIPE
        )
        assert caller.stdout is not None
        try:
            assert b"Accepted" in await caller.stdout.readline() or stage.peer.followers
            (follower,) = stage.peer.followers
            os.kill(caller.pid, signal.SIGSTOP)
            assert await stage.peer.leaves.get() == Leave(follower=follower, returns=True)
            assert caller.returncode is None, "its connection was never closed"
        finally:
            caller.kill()
            await caller.wait()
