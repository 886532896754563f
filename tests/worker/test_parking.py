"""Parked latents beyond their share go into files and come back to the bit; none is lost on the
way, and no file stays behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.mesh.parking_cost import flux_state_bytes, wan_state_bytes
from gpuworker.loading import load_card
from gpuworker.memory.latents import LatentPlace, LatentShelf, Shares
from gpuworker.state import LatentState
from hocket.v1 import mesh_pb2
from tests.waiting import until
from tests.worker.tiny_models import TEXT_TOKENS, Reference, wan_unipc_reference
from tests.worker.worker_pool import CPU


def state(seed: int, steps_done: int = 3) -> LatentState:
    drawn = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 64, 16, generator=drawn)
    latents[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    embeds = torch.randn(1, 7, 32, generator=drawn).to(torch.bfloat16)
    tensors = {"latents": latents, "embeds": embeds, "random": torch.arange(5)}
    return LatentState(tensors, steps_done, 8, {"seed": seed, "guidance_scale": 3.5})


SIZE = state(0).nbytes


class Store:
    """What a rendezvous does for a shelf."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def drop(self, key: str) -> None:
        self.blobs.pop(key, None)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def shelf(tmp_path: Path, store: Store) -> Iterator[LatentShelf]:
    """Room for two."""
    (tmp_path / "w0").mkdir()
    (tmp_path / "w0" / "left.safetensors").write_bytes(b"of an earlier process")
    shares = Shares(device_bytes=2 * SIZE, folder=tmp_path / "w0")
    made = LatentShelf(store.blobs.__setitem__, store.drop, shares)
    yield made
    made.close()
    assert not (tmp_path / "w0").exists()


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "w0").iterdir())


def spilled(shelf: LatentShelf) -> list[str]:
    return [held.request_id for held in shelf.held() if held.spilled]


async def settled(shelf: LatentShelf) -> None:
    await until(lambda: shelf.bytes_in(LatentPlace.DEVICE) <= 2 * SIZE)


async def test_the_least_recently_used_go_and_come_back_to_the_bit(
    shelf: LatentShelf, tmp_path: Path
) -> None:
    assert files(tmp_path) == [], "what an earlier process left is gone"
    for number in range(5):
        shelf.put(f"r{number}", state(number))
    await settled(shelf)
    assert spilled(shelf) == ["r0", "r1", "r2"]
    assert shelf.bytes_in(LatentPlace.FILE) == 3 * SIZE and len(files(tmp_path)) == 3
    assert [held.steps_done for held in shelf.held()] == [3] * 5
    back = shelf.get("r1", 3)
    assert back is not None and back.to_bytes() == state(1).to_bytes()
    await settled(shelf)
    assert spilled(shelf) == ["r0", "r2", "r3"], "it is the newest now"


async def test_a_spilled_one_is_offered_as_it_is(shelf: LatentShelf, store: Store) -> None:
    for number in range(4):
        shelf.put(f"r{number}", state(number))
    await settled(shelf)
    assert "r0" in spilled(shelf)
    reply = shelf.offer(mesh_pb2.LatentRequest(request_id="r0", steps_done=3))
    assert store.blobs[reply.key] == state(0).to_bytes()
    assert "r0" in spilled(shelf), "nobody here needs it"


async def test_artifacts_of_one_request_are_counted_and_spilled_one_by_one(
    shelf: LatentShelf, store: Store
) -> None:
    pixels = torch.arange(SIZE, dtype=torch.int64).to(torch.uint8).reshape(1, 1, -1, 1)
    picture = LatentState({"pixels": pixels}, 0, 0, {"width": SIZE})
    shelf.put("r", picture, "small.image")
    for number, artifact in enumerate(("text.embeddings", "first.latents"), 1):
        shelf.put("r", state(number), artifact)
    await settled(shelf)
    held = {each.artifact: each for each in shelf.held()}
    assert [name for name, each in held.items() if each.spilled] == ["small.image"]
    assert held["small.image"].size_bytes == SIZE
    shelf.put("s", state(9), "small.image")
    back = shelf.get("r", 0, "small.image")
    assert back is not None and back.to_bytes() == picture.to_bytes()
    asked = mesh_pb2.LatentRequest(request_id="r", steps_done=3, artifact="first.latents")
    keys = [shelf.offer(asked).key]
    asked.artifact, asked.steps_done = "small.image", 0
    keys.append(shelf.offer(asked).key)
    assert len(store.blobs) == 2, "each artifact is lent by itself"
    shelf.release("r")
    assert [each.request_id for each in shelf.held()] == ["s"] and not store.blobs
    shelf.put("r", picture, "small.image")
    assert shelf.steps_done("r", "small.image") is None, "it has ended"


async def test_what_is_in_hand_stays(shelf: LatentShelf) -> None:
    for number in range(2):
        shelf.put(f"r{number}", state(number))
    with shelf.in_hand(["r0", "r1"]):
        shelf.put("r2", state(2))
        shelf.put("r3", state(3))
        await until(lambda: len(spilled(shelf)) == 2)
        assert spilled(shelf) == ["r2", "r3"]


async def test_a_newer_state_and_a_release_take_the_file_away(
    shelf: LatentShelf, tmp_path: Path
) -> None:
    for number in range(4):
        shelf.put(f"r{number}", state(number))
    await settled(shelf)
    assert len(files(tmp_path)) == 2
    shelf.put("r0", state(0, steps_done=4))
    await settled(shelf)
    assert shelf.steps_done("r0") == 4 and shelf.get("r0", 3) is None
    for number in range(4):
        shelf.release(f"r{number}")
    await until(lambda: not files(tmp_path))
    assert shelf.held() == ()


async def test_a_file_that_cannot_be_read_is_a_latent_not_held(
    shelf: LatentShelf, tmp_path: Path
) -> None:
    for number in range(3):
        shelf.put(f"r{number}", state(number))
    await settled(shelf)
    (name,) = files(tmp_path)
    (tmp_path / "w0" / name).write_bytes(b"torn")
    assert shelf.get("r0", 3) is None
    assert [held.request_id for held in shelf.held()] == ["r1", "r2"]
    reply = shelf.offer(mesh_pb2.LatentRequest(request_id="r0", steps_done=3))
    assert reply.failure.reason == "LATENT_MISSING"


async def test_where_no_file_can_be_written_latents_stay(
    shelf: LatentShelf, tmp_path: Path
) -> None:
    (tmp_path / "w0").rmdir()
    for number in range(4):
        shelf.put(f"r{number}", state(number))
    await until(lambda: shelf._stuck)
    for number in range(4):
        back = shelf.get(f"r{number}", 3)
        assert back is not None and back.to_bytes() == state(number).to_bytes()


async def test_when_memory_ran_out_all_that_is_parked_goes(tmp_path: Path, store: Store) -> None:
    shares = Shares(folder=tmp_path / "w0")  # unlimited
    shelf = LatentShelf(store.blobs.__setitem__, store.drop, shares)
    for number in range(3):
        shelf.put(f"r{number}", state(number))
    with shelf.in_hand(["r2"]):
        shelf.spill_parked()
        await until(lambda: spilled(shelf) == ["r0", "r1"])
    shelf.put("r3", state(3))
    assert shelf.bytes_in(LatentPlace.DEVICE) == 2 * SIZE
    shelf.close()


def test_without_a_share_nothing_is_spilled(store: Store) -> None:
    shelf = LatentShelf(store.blobs.__setitem__, store.drop)
    for number in range(100):
        shelf.put(f"r{number}", state(number))
    assert shelf.bytes_in(LatentPlace.DEVICE) == 100 * SIZE
    shelf.close()


def test_the_arithmetic_of_parked_jobs_is_that_of_real_ones(
    flux: Reference, wan: Reference, tmp_path: Path
) -> None:
    """What `python -m bench memory` says of models that are too large to be run here."""
    unipc = wan_unipc_reference(tmp_path / "unipc")
    small = {"text_tokens": TEXT_TOKENS, "text_width": 32, "element_bytes": 4}
    have = [(r, load_card(r.folder, CPU, torch.float32)) for r in (flux, wan, unipc)]
    sizes = []
    for reference, card in have:
        states = [card.encode(**reference.settings)]
        for _ in range(4):
            states = card.step(states, None)
        sizes.append(states[0].nbytes)
    shape = [wan.settings[name] for name in ("width", "height", "frames")]
    packed = {"pixels_a_token": 4, "channels": 16, "pooled_width": 32}
    assert sizes == [
        flux_state_bytes(28, 28, **packed, **small),
        wan_state_bytes(*shape, history=0, **small),
        wan_state_bytes(*shape, history=3, **small),
    ]
