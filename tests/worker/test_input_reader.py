"""What is told of a file that a request brought and that cannot be taken."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any

import nats.errors
import nats.js.errors
import pytest
from nats.js.api import RawStreamMsg

from gpuworker.memory.latents import CalledOff
from gpuworker.mesh import input_reader
from gpuworker.mesh.input_reader import InputReader
from gpuworker.steps.files import InputAway, InputMissing, NoFiles

NAME = "t/sha256:" + "0" * 64
UNAVAILABLE = nats.js.errors.ServiceUnavailableError(code=503, err_code=10008)
GONE = nats.js.errors.NotFoundError(code=404, err_code=10037)


@dataclass
class Broker:
    """Answers every get alike: with an error, with content, or not at all."""

    answer: bytes | Exception | None = None
    jetstream: Any = field(init=False)

    def __post_init__(self) -> None:
        self.jetstream = self

    async def get_msg(self, *_: object, **__: object) -> RawStreamMsg:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return RawStreamMsg(data=self.answer, seq=1)


async def taken(broker: Any, *, timeout_s: float = 60.0, off: bool = False) -> BaseException:
    reader, called_off = InputReader(broker, "b"), threading.Event()
    if off:
        called_off.set()
    with pytest.raises(Exception) as caught:
        await asyncio.to_thread(reader.take, "r", NAME, timeout_s, called_off)
    reader.close()
    return caught.value


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        (GONE, InputMissing, "not in the store of inputs"),
        (b'{"deleted": true}', InputMissing, "not in the store of inputs"),
        (b"[1]", InputMissing, "description"),
        (json.dumps({"nuid": "n", "size": 2}).encode(), InputMissing, "digest"),
        (UNAVAILABLE, InputAway, "ServiceUnavailable"),
        (nats.errors.TimeoutError(), InputAway, "TimeoutError"),
        (ConnectionResetError("reset"), InputAway, "reset"),
    ],
)
async def test_only_what_the_store_says_is_gone_is_missing(
    answer: bytes | Exception, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_reader, "_AGAIN_S", 0.0)
    found = await taken(Broker(answer))
    assert type(found) is kind and told in str(found), found


async def test_a_file_that_is_not_here_in_time_is_not_missing() -> None:
    assert type(await taken(Broker(), timeout_s=0.0)) is InputAway
    assert type(await taken(Broker(), off=True)) is CalledOff
    with pytest.raises(InputAway):
        NoFiles().take("r", NAME, 1.0, threading.Event())
