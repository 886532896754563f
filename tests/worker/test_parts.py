"""Parts by content: what models have in common is loaded, counted and evicted once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from gpuworker.folders.identity import FileDigests, part_id
from gpuworker.loading import LoadError, distinct_bytes
from gpuworker.memory.budget import Memory
from gpuworker.memory.latents import LatentShelf
from gpuworker.memory.parts import NodeName
from gpuworker.memory.weights import BudgetTooSmall, MemoryDemand, WeightStore
from gpuworker.model_info import model_info
from gpuworker.models.card import ModelCard
from gpuworker.torch_executor import load_cards
from tests.waiting import until
from tests.worker.tiny_models import Reference
from tests.worker.tiny_sd3 import sd3_pipeline
from tests.worker.worker_pool import CPU

CONTENT = "diffusion_pytorch_model.safetensors"


class Family(NamedTuple):
    """FLUX, the same with another VAE, and SD3 with FLUX's T5 and VAE."""

    flux: str
    other: str
    sd3: str


@pytest.fixture(scope="module")
def family(flux: Reference, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    other = Path(shutil.copytree(flux.folder, folder / "other"))
    vae = load_file(other / "vae" / CONTENT)
    save_file({name: 2 * tensor for name, tensor in vae.items()}, other / "vae" / CONTENT)
    sd3 = folder / "sd3"
    sd3_pipeline().save_pretrained(sd3)
    shutil.rmtree(sd3 / "text_encoder_3")
    shutil.copytree(Path(flux.folder) / "text_encoder_2", sd3 / "text_encoder_3")
    shutil.rmtree(sd3 / "vae")
    shutil.copytree(Path(flux.folder) / "vae", sd3 / "vae")
    return Family(flux.folder, str(other), str(sd3))


def shared(family: Family, store: WeightStore) -> dict[str, ModelCard]:
    return load_cards((f"flux={family.flux}", family.other, family.sd3), CPU, store)


def part_names(store: WeightStore, model: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node, part in store.model_parts(model):
        found.setdefault(node, []).append(part)
    return found


def test_models_share_modules_whose_weights_are_the_same(family: Family) -> None:
    store, alone = WeightStore(CPU), [WeightStore(CPU) for _ in family]
    cards = shared(family, store)
    for source, one in zip(family, alone, strict=True):
        load_cards((source,), CPU, one)
    flux, other, sd3 = (part_names(store, name) for name in cards)
    assert flux["dit"] == other["dit"] and flux["text"] == other["text"]
    assert flux["vae"] != other["vae"] and flux["vae"] == sd3["vae"]
    assert [len(each["text"]) for each in (flux, sd3)] == [2, 3]
    assert set(flux["text"]) & set(sd3["text"]) == {flux["text"][1]}, "the T5, and no CLIP"
    assert [len(one.facts()) for one in alone] == [4, 4, 5]
    assert len(store.facts()) == 4 + 1 + 3
    bytes_alone = [sum(fact.size_bytes for fact in one.facts()) for one in alone]
    assert sum(fact.size_bytes for fact in store.facts()) < sum(bytes_alone)
    assert vars(cards["flux"])["_elastic"] is vars(cards["other"])["_elastic"]
    info = model_info(cards["sd3"].facts, parts=store.model_parts("sd3"))
    assert [(p.node, p.part) for p in info.parts if p.node == "text"] == [
        ("text", part) for part in sd3["text"]
    ]


def test_models_that_share_make_what_they_make_alone(family: Family, flux: Reference) -> None:
    """Settings of a decoder or a transformer that one model changes must not reach the other."""
    found = []
    together = shared(family, WeightStore(CPU))
    for name in ("flux", "other"):
        (alone,) = load_cards(
            (family.flux if name == "flux" else family.other,), CPU, WeightStore(CPU)
        ).values()
        for card in (alone, together[name]):
            state = card.encode(**flux.settings)
            while not state.finished:
                (state,) = card.step([state], None)
            found.append((state.to_bytes(), card.decode(state).tobytes()))
    assert found[0] == found[1] and found[2] == found[3]
    assert found[0][0] == found[2][0] and found[0][1] != found[2][1], "the VAE alone differs"


def test_heartbeats_tell_a_shared_part_for_each_model_and_count_it_once(family: Family) -> None:
    store = WeightStore(CPU, 64 << 20)
    memory = Memory(shared(family, store), CPU, store, LatentShelf(lambda *_: None, lambda _: None))
    facts = memory.facts()
    memory.close()
    by_part = {part.part: part.size_bytes for part in facts.parts}
    assert len(facts.parts) == 4 + 4 + 5 and len(by_part) == 8
    assert facts.weights_bytes == sum(by_part.values()), "all of it is there, each once"
    assert facts.loads == len(by_part)


SIDE = 32
BYTES = SIDE * SIDE * 4
FLUX, SD3 = ("flux", "text"), ("sd3", "text")


@pytest.fixture
def encoders(tmp_path: Path) -> Iterator[tuple[WeightStore, dict[str, nn.Module]]]:
    """Two text nodes with a CLIP each and one T5, room for a node and no more."""
    store, modules = WeightStore(CPU, 2 * BYTES), {}
    for name in ("clip-a", "t5", "clip-b"):
        modules[name] = nn.Linear(SIDE, SIDE, bias=False)
        save_file(dict(modules[name].state_dict()), tmp_path / name)
    for node, part in ((FLUX, "clip-a"), (FLUX, "t5"), (SD3, "clip-b"), (SD3, "t5")):
        store.add(node, part, modules[part], (tmp_path / part,))
    store.start(lambda _: 0)
    yield store, modules
    store.close()


def resident(store: WeightStore) -> set[str]:
    return {fact.part for fact in store.facts() if fact.resident}


def demand(sequence: int, node: NodeName, evict: tuple[str, ...] = ()) -> MemoryDemand:
    return MemoryDemand((1, sequence), node, 0, evict)


def test_a_load_for_one_model_counts_for_the_other(
    encoders: tuple[WeightStore, dict[str, nn.Module]],
) -> None:
    store, modules = encoders
    assert (resident(store), store.loads) == ({"clip-a", "t5"}, 2)
    t5 = modules["t5"].weight
    with store.use(demand(1, SD3)) as told:
        assert resident(store) == {"clip-b", "t5"} and (store.loads, store.evictions) == (3, 1)
        (note,) = told
        assert note.attributes["hocket.part"] == "sd3/text"
    with store.use(demand(2, FLUX)):
        assert resident(store) == {"clip-a", "t5"} and modules["t5"].weight is t5
        assert modules["clip-b"].weight.numel() == 0
    store.evict_others(keep=SD3)
    assert resident(store) == {"t5"}
    store.evict_others(keep=("", ""))
    with store.use(demand(3, FLUX)) as told:
        waited = [int(note.attributes["hocket.waited_us"]) for note in told]
        assert len(waited) == 2 and waited[0] == 0 < waited[1], "reports add it up"


async def test_all_parts_of_a_node_come_and_a_wanted_one_stays(
    encoders: tuple[WeightStore, dict[str, nn.Module]],
) -> None:
    """A plan may name a part that is in use, or needed next, as one that should leave."""
    store, _ = encoders
    store.evict_others(keep=("", ""))
    store.expect(demand(1, SD3))
    await until(lambda: resident(store) == {"clip-b", "t5"})
    store.expect(demand(2, FLUX, evict=("t5",)))
    with store.use(demand(1, SD3)) as told:
        assert len(told) == 2 and resident(store) == {"clip-b", "t5"}
    with store.use(demand(2, FLUX, evict=("t5",))):
        assert resident(store) == {"clip-a", "t5"}


async def test_a_part_that_cannot_be_loaded_is_told_for_its_node(
    encoders: tuple[WeightStore, dict[str, nn.Module]], tmp_path: Path
) -> None:
    store, _ = encoders
    (tmp_path / "clip-b").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError), store.use(demand(1, SD3)):
        pass
    (tmp_path / "away").rename(tmp_path / "clip-b")
    with store.use(demand(2, SD3)):
        assert resident(store) == {"clip-b", "t5"}


def test_a_node_whose_parts_do_not_fit_together_is_refused(tmp_path: Path) -> None:
    store = WeightStore(CPU, BYTES + BYTES // 2)
    for name in ("clip", "t5"):
        module = nn.Linear(SIDE, SIDE, bias=False)
        save_file(dict(module.state_dict()), tmp_path / name)
        if name == "t5":
            with pytest.raises(BudgetTooSmall, match="flux's text") as found:
                store.add(FLUX, name, module, (tmp_path / name,))
            assert (found.value.node, found.value.size_bytes) == (FLUX, 2 * BYTES)
        else:
            store.add(FLUX, name, module, (tmp_path / name,))


def test_identity_is_content_and_not_names(flux: Reference, tmp_path: Path) -> None:
    """A copy, and a blob of the hub's cache, are the same; one other bit or precision is not."""
    component = Path(flux.folder) / "vae"
    config = json.loads((component / "config.json").read_text())
    digests = FileDigests()
    (name,) = (digests.of(component / CONTENT),)
    cache = tmp_path / "models--o--n"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "r").mkdir(parents=True)
    (cache / "blobs" / name).write_bytes(b"not looked at")
    (cache / "snapshots" / "r" / CONTENT).symlink_to(f"../../blobs/{name}")
    before = digests.hashed_bytes
    assert digests.of(cache / "snapshots" / "r" / CONTENT) == name
    assert digests.hashed_bytes == before, "its name says it"
    one = part_id("AutoencoderKL", config, "torch.float32", [name])
    newer = {**config, "_diffusers_version": "9", "_name_or_path": "elsewhere"}
    assert part_id("AutoencoderKL", newer, "torch.float32", [name]) == one
    others = [
        part_id("AutoencoderKLWan", config, "torch.float32", [name]),
        part_id("AutoencoderKL", {**config, "scaling_factor": 2}, "torch.float32", [name]),
        part_id("AutoencoderKL", config, "torch.bfloat16", [name]),
        part_id("AutoencoderKL", config, "torch.float32", [name[::-1]]),
    ]
    assert len({one, *others}) == 5


def test_a_file_is_hashed_once_a_host(tmp_path: Path) -> None:
    file, memo = tmp_path / "weights", tmp_path / "state" / "file-digests.json"
    file.write_bytes(b"a" * 100)
    first, second = FileDigests(memo), FileDigests(memo)
    digest = first.of(file)
    assert second.of(file) == digest and first.of(file) == digest
    assert (first.hashed_bytes, second.hashed_bytes) == (100, 0)
    file.write_bytes(b"b" * 101)
    assert FileDigests(memo).of(file) == second.of(file) != digest
    for broken in ("{", "[]", '{"x": 1}'):
        memo.write_text(broken)
        assert FileDigests(memo).of(file) == second.of(file)


def test_what_is_shared_is_counted_once_before_it_is_loaded(family: Family) -> None:
    digests = FileDigests()
    both = distinct_bytes((family.flux, family.other), digests)
    vae_bytes = (Path(family.other) / "vae" / CONTENT).stat().st_size
    assert both == distinct_bytes((family.flux,), digests) + vae_bytes


def test_two_models_of_one_name_are_refused(family: Family) -> None:
    with pytest.raises(LoadError, match="two models have this name; NAME=PATH") as refused:
        load_cards((f"m={family.flux}", f"m={family.other}"), CPU, WeightStore(CPU))
    assert refused.value.missing == "m"
