"""A request's adapters, a control picture and a picture to edit, live: FLUX, FLUX with a ControlNet
and FLUX.1 Kontext on the same workers, each result that of the card's direct calls, all of it from
one text encoder, one denoiser and one VAE.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from gpuworker.loading import load_card
from gpuworker.models.card import Asked, ModelCard
from hocket.client import HocketClient
from hocket.errors import InvalidRequest
from hocket.launching.launcher import MeshPlan, mesh
from hocket.v1.control_pb2 import WatchClusterRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from tests.worker.tiny_adapters import flux_loras
from tests.worker.tiny_pictures import flux_control, flux_kontext, noisy_picture

WAIT_S = 300.0
ASKED = Asked("a red fox on the sea", "", 28, 28, 1, 4, 3.5, 11)
STYLE, BOTH = {"style": 0.8}, {"style": -0.3, "detail": 0.5}
MAKE = {"plain": flux_loras, "control": flux_control, "kontext": flux_kontext}
Pixels = NDArray[np.uint8]


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    return file.getvalue()


def listed(loras: Mapping[str, float]) -> list[str]:
    return [f"{name}:{scale:g}" for name, scale in loras.items()]


def direct(card: ModelCard, begun: Mapping[str, Any]) -> Pixels:
    """What the card makes by itself of what a job begins from."""
    state = card.begin(card.embed(ASKED), ASKED, **begun)
    while not state.finished:
        (state,) = card.step([state], None)
    return card.decode(state)[0]


def expected(folders: Mapping[str, Path], picture: Pixels) -> dict[str, Pixels]:
    cards = {n: load_card(str(f), torch.device("cpu"), torch.float32) for n, f in folders.items()}
    plain, latents = cards["plain"], cards["plain"].encode_image(picture, ASKED.seed)
    begun: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("plain", {}),
        "style": ("plain", {"loras": STYLE}),
        "both": ("plain", {"loras": BOTH}),
        "img2img": ("plain", {"latents": latents, "strength": 0.6, "loras": STYLE}),
        "control": ("control", {"control": latents, "control_scale": 0.7}),
        "edit": ("kontext", {"reference": latents}),
    }
    assert plain.adapters == ("detail", "style")
    return {name: direct(cards[model], one) for name, (model, one) in begun.items()}


async def test_adapters_control_and_edits_from_one_set_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in MAKE}
    for name, make in MAKE.items():
        make(folders[name])
        (folders[name] / "card.json").unlink()
    picture = noisy_picture(ASKED.width, ASKED.height)
    monkeypatch.setenv("HOCKET_MEMORY_MIB", "96")
    models = tuple(f"{name}={folder}" for name, folder in folders.items())
    plan = MeshPlan(tmp_path / "state", workers=2, models=models, log_level="warning")
    async with (
        mesh(plan, lambda _: None) as running,
        HocketClient(running.gateway) as client,
        asyncio.timeout(WAIT_S),
    ):
        infos = {info.name: info for info in await client.models()}
        assert list(infos["plain"].adapters) == ["detail", "style"]
        assert not infos["control"].adapters
        image = (await client.put_input(png(picture))).name

        async def made(**options: Any) -> Pixels:
            settings = {"shape": (28, 28), "steps": 4, "guidance": 3.5, "seed": ASKED.seed}
            content, _ = await client.generate_media(ASKED.prompt, **(settings | options))
            with Image.open(io.BytesIO(content)) as opened:
                return np.asarray(opened)

        asked: dict[str, dict[str, Any]] = {
            "plain": {"model": "plain"},
            "style": {"model": "plain", "loras": listed(STYLE)},
            "both": {"model": "plain", "loras": listed(BOTH)},
            "img2img": {
                "model": "plain",
                "workflow": "img2img",
                "inputs": {"image": image},
                "loras": listed(STYLE),
            },
            "control": {"model": "control", "workflow": "control", "inputs": {"control": image}},
            "edit": {"model": "kontext", "workflow": "edit", "inputs": {"image": image}},
        }
        results = await asyncio.gather(*[made(**options) for options in asked.values()])
        direct_ones = await asyncio.to_thread(expected, folders, picture)
        for name, pixels in zip(asked, results, strict=True):
            apart = np.abs(pixels.astype(int) - direct_ones[name])
            assert apart.max() <= 1, name
            others = [one for other, one in direct_ones.items() if other != name]
            assert not any(np.abs(one.astype(int) - pixels).max() <= 1 for one in others), name
        await refusals(made, image)
        async with grpc.aio.insecure_channel(running.control) as channel:
            watch = ControlServiceStub(channel).WatchCluster(WatchClusterRequest())
            workers = (await watch.read()).workers
    for worker in workers:
        parts = {part.part: part.size_bytes for part in worker.memory.parts}
        assert len(worker.memory.parts) == 13, "four a model, and the ControlNet"
        assert len(parts) == 5, "one CLIP, one T5, one denoiser, one VAE, one ControlNet"
        assert worker.memory.weights_bytes <= sum(parts.values())


async def refusals(made: Any, image: str) -> None:
    for options, told in (
        (
            {"model": "plain", "workflow": "edit", "inputs": {"image": image}},
            "reference of node denoise of edit, which plain does",
        ),
        (
            {"model": "kontext", "workflow": "control", "inputs": {"control": image}},
            "control of node denoise of control, which kontext",
        ),
        ({"model": "plain", "loras": ["stile"]}, "spec.loras.*'stile'.*detail, style"),
        ({"model": "kontext", "loras": ["style"]}, "spec.loras.*'style'.*none"),
    ):
        with pytest.raises(InvalidRequest, match=told):
            await made(**options)
