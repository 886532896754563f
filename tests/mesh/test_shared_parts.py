"""Two models with one encoder and one denoiser, live: named by the operator, published without
card.json, served at a size that no list has, and resident once.
"""

from __future__ import annotations

import asyncio
import io
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gpuworker.loading import load_card
from hocket.client import HocketClient
from hocket.errors import InvalidRequest
from hocket.launching.launcher import MeshPlan, mesh
from hocket.v1 import types_pb2
from hocket.v1.control_pb2 import WatchClusterRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import GenerateRequest
from tests.worker.tiny_models import flux_reference

WAIT_S = 120.0
SIZE = {"width": 44, "height": 28}


def asked(model: str, **shape: int) -> GenerateRequest:
    spec = types_pb2.GenerationSpec(
        model=model,
        prompt="a red fox on the sea",
        shape=types_pb2.Shape(**{**SIZE, **shape}),
        steps=4,
        guidance_scale=3.5,
        seed=11,
    )
    return GenerateRequest(spec=spec)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    first, second = tmp_path / "tiny-flux", tmp_path / "other"
    flux_reference(first)
    (first / "card.json").unlink()
    shutil.copytree(first, second)
    (file,) = (second / "vae").glob("*.safetensors")
    save_file({name: 2 * each for name, each in load_file(file).items()}, file)
    return {"first": first, "second": second}


def alone(folder: Path) -> np.ndarray:
    card = load_card(str(folder), torch.device("cpu"), torch.float32)
    state = card.encode("a red fox on the sea", "", 44, 28, 1, 4, 3.5, 11)
    while not state.finished:
        (state,) = card.step([state], None)
    return card.decode(state)[0]


async def test_two_models_that_share_are_served_as_if_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOCKET_MEMORY_MIB", "96")
    models = tuple(f"{name}={folder}" for name, folder in folders.items())
    plan = MeshPlan(tmp_path / "state", workers=1, models=models, log_level="warning")
    async with (
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        asyncio.timeout(WAIT_S),
    ):
        infos = {info.name: info for info in await client.models()}
        assert infos.keys() == folders.keys()
        for name, folder in folders.items():
            content, _ = await client.generate_media(asked(name))
            with Image.open(io.BytesIO(content)) as picture:
                apart = np.abs(np.asarray(picture).astype(int) - alone(folder))
            assert apart.max() <= 1
        with pytest.raises(InvalidRequest, match="in steps of 4; nearest: 44x28"):
            await client.generate_media(asked("first", width=45))
        async with grpc.aio.insecure_channel(running.control) as channel:
            watch = ControlServiceStub(channel).WatchCluster(WatchClusterRequest())
            (worker,) = (await watch.read()).workers
    sizes = {part.part: part.size_bytes for part in worker.memory.parts}
    assert len(worker.memory.parts) == 8 and len(sizes) == 5, "only the VAEs differ"
    assert worker.memory.weights_bytes == sum(sizes.values())
    assert (worker.memory.loads, worker.memory.evictions) == (5, 0)
