"""Model folders as they come: what is served, what it is called, what is refused in which words.

Every folder is the tiny Flux, as libraries, the hub's cache, git and broken downloads leave one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpuworker.folders.files import weight_files
from gpuworker.folders.identity import FileDigests
from gpuworker.folders.source import located
from gpuworker.loading import LoadError, load_card
from gpuworker.memory.weights import MemoryDemand, WeightStore
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import CPU

PLAIN = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.fixture
def folder(flux: Reference, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(flux.folder, tmp_path / "tiny"))


def first_state(source: str | Path, flux: Reference, dtype: torch.dtype = torch.float32) -> bytes:
    """What a model makes of the prompt: equal bytes are equal text encoders and noise."""
    return load_card(str(source), CPU, dtype).encode(**flux.settings).to_bytes()


def as_cache(folder: Path, root: Path, revision: str = "0a1b2c") -> Path:
    """The folder in the hub's layout; returns the snapshot."""
    snapshot = root / "snapshots" / revision
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    (root / "blobs").mkdir()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, root / "blobs" / digest)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / digest, link.parent))
    return snapshot


def in_shards(component: Path, variant: str = "") -> None:
    """Its weights in two files and an index; the whole one leaves."""
    (whole,) = component.glob("*.safetensors")
    weights, stem = load_file(whole), whole.name.removesuffix(".safetensors")
    whole.unlink()
    names, placed = sorted(weights), {}
    for number in (0, 1):
        file = f"{stem}{'.' * bool(variant)}{variant}-0000{number + 1}-of-00002.safetensors"
        part = {name: weights[name] for name in names[number::2]}
        save_file(part, component / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    middle = f".{variant}" if variant else ""
    index = component / f"{stem}.safetensors.index{middle}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def as_variant(component: Path, variant: str, dtype: torch.dtype) -> None:
    (whole,) = component.glob("*.safetensors")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(whole).items()}
    stem = whole.name.removesuffix(".safetensors")
    save_file(weights, component / f"{stem}.{variant}.safetensors", metadata={"format": "pt"})
    whole.unlink()


# ------------------------------------------------------------------------------------------------
# names


def test_a_model_is_called_as_its_owner_would(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--black-forest--FLUX.9-dev"
    snapshot = as_cache(folder, root)
    names = {
        folder: "tiny",
        f"{folder}/": "tiny",
        f"mine={folder}": "mine",
        root: "FLUX.9-dev",
        snapshot: "FLUX.9-dev",
        f"my.flux={root}": "my.flux",
    }
    for source, name in names.items():
        assert load_card(str(source), CPU, torch.float32).facts.name == name
    assert located(str(root)).folder == snapshot, "the main revision"
    (folder / "card.json").write_text('{"name": "by-card", "text_tokens": 13}')
    assert load_card(str(folder), CPU, torch.float32).facts.name == "by-card"
    assert load_card(f"mine={folder}", CPU, torch.float32).facts.name == "mine"


def test_a_link_and_a_path_with_an_equals_sign(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "served").symlink_to(folder)
    assert located(str(tmp_path / "served")).name == "served"
    folder.rename(tmp_path / "size=9")
    assert located(str(tmp_path / "size=9")).name == "size=9"


def test_a_name_that_no_cluster_takes(folder: Path) -> None:
    other = folder.rename(folder.parent / "my model")
    for asked in (str(other), f"my flux={other}", f"={other}"):
        with pytest.raises(LoadError, match=r"allowed: 1 to 128 of.*; NAME=FOLDER") as refused:
            load_card(asked, CPU, torch.float32)
        assert refused.value.missing == "name"
    assert load_card(f"mine={other}", CPU, torch.float32).facts.name == "mine"


@pytest.mark.parametrize(
    ("asked", "missing", "said"),
    [
        ("m=", "path", "found none after m="),
        ("m=/no/such", "/no/such", "no such folder, and not a hub id"),
        ("./no/such", "./no/such", "no such folder"),
    ],
)
def test_a_source_that_is_none(asked: str, missing: str, said: str) -> None:
    with pytest.raises(LoadError, match=said) as refused:
        located(asked)
    assert refused.value.missing == missing


# ------------------------------------------------------------------------------------------------
# served


def test_the_hub_s_cache_is_served_and_nothing_of_it_hashed(
    flux: Reference, folder: Path, tmp_path: Path
) -> None:
    snapshot, digests = as_cache(folder, tmp_path / "models--o--n"), FileDigests()
    store = WeightStore(CPU)
    load_card(str(snapshot), CPU, torch.float32, store, digests)
    assert digests.hashed_bytes == 0
    load_card(f"copy={flux.folder}", CPU, torch.float32, store, digests)
    assert digests.hashed_bytes > 0
    assert all(len(fact.nodes) == 2 for fact in store.facts()), "a copy of it is the same parts"


def test_shards_are_read_and_come_back(flux: Reference, folder: Path) -> None:
    for component in ("transformer", "text_encoder_2"):
        in_shards(folder / component)
    store = WeightStore(CPU, 1 << 24)
    card = load_card(f"m={folder}", CPU, torch.float32, store)
    assert store._used_bytes() == 0, "each tensor is found in a shard"
    store.start(lambda _: 0)
    with store.use(MemoryDemand((1, 1), ("m", "text"), 0)):
        state = card.encode(**flux.settings)
    plain = load_card(flux.folder, CPU, torch.float32)
    assert state.to_bytes() == plain.encode(**flux.settings).to_bytes()
    with store.use(MemoryDemand((1, 2), ("m", "dit"), 0)):
        (mine,) = card.step([state], None)
    assert mine.to_bytes() == plain.step([state], None)[0].to_bytes()
    store.close()


def test_a_variant_is_taken_where_there_is_nothing_else(flux: Reference, folder: Path) -> None:
    """Half precision widens without loss; stock diffusers is told `variant` for that."""
    plain = first_state(flux.folder, flux)
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        as_variant(folder / component, "fp16", torch.float16)
    half = first_state(folder, flux)
    assert half != plain
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (whole,) = (folder / component).glob("*.safetensors")
        whole.rename(whole.with_name(whole.name.replace(".fp16", "")))
    assert first_state(folder, flux) == half
    in_shards(folder / "text_encoder_2", "fp16")
    assert first_state(folder, flux) == half, "in shards, too"


def test_of_several_variants_the_nearest_precision_is_taken(folder: Path) -> None:
    def taken(dtype: torch.dtype) -> str | None:
        return weight_files("asked", folder / "vae", "diffusion_pytorch_model", dtype).variant

    for variant in ("fp16", "bf16", "ema"):
        name = f"diffusion_pytorch_model.{variant}.safetensors"
        shutil.copy(folder / "vae" / PLAIN, folder / "vae" / name)
    assert taken(torch.bfloat16) is None, "the plain one, where it is there"
    (folder / "vae" / PLAIN).unlink()
    assert (taken(torch.bfloat16), taken(torch.float32)) == ("bf16", "fp16")
    for variant in ("fp16", "bf16"):
        (folder / "vae" / f"diffusion_pytorch_model.{variant}.safetensors").unlink()
    assert taken(torch.float32) == "ema", "the only one"


def test_null_components_and_newer_configurations_are_served(flux: Reference, folder: Path) -> None:
    index = folder / "model_index.json"
    new = {"image_encoder": [None, None], "feature_extractor": [None, None], "new_option": None}
    index.write_text(json.dumps({**json.loads(index.read_text()), **new}))
    for name in ("transformer", "vae", "text_encoder_2"):
        config = folder / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "of_tomorrow": 1}))
    assert first_state(folder, flux) == first_state(flux.folder, flux)


def test_weights_that_are_not_read_may_be_anything(flux: Reference, folder: Path) -> None:
    """As a git clone leaves them from which only safetensors were pulled."""
    (folder / "vae" / "diffusion_pytorch_model.bin").write_text(POINTER)
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_text(POINTER)
    (folder / "text_encoder" / "flax_model.msgpack").symlink_to("nowhere")
    assert first_state(folder, flux) == first_state(flux.folder, flux)


# ------------------------------------------------------------------------------------------------
# refused


def _dangling(folder: Path) -> None:
    file = folder / "vae" / PLAIN
    file.unlink()
    file.symlink_to("../../blobs/0123")


def _dangling_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").symlink_to("../../blobs/4567")


def _pointer(folder: Path) -> None:
    (folder / "vae" / PLAIN).write_text(POINTER)


def _pointer_of_config(folder: Path) -> None:
    (folder / "model_index.json").write_text(POINTER)


def _missing_shard(folder: Path) -> None:
    in_shards(folder / "transformer")
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def _missing_index(folder: Path) -> None:
    in_shards(folder / "transformer")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()


def _broken_index(folder: Path) -> None:
    in_shards(folder / "transformer")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"metadata": {}}')


def _stray_index(folder: Path) -> None:
    in_shards(folder / "transformer")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../vae/" + PLAIN}}))


def _pickle(folder: Path) -> None:
    (folder / "vae" / PLAIN).rename(folder / "vae" / "diffusion_pytorch_model.bin")


def _other_name(folder: Path) -> None:
    (folder / "vae" / PLAIN).rename(folder / "vae" / "flux1-ae.safetensors")


def _no_weights(folder: Path) -> None:
    (folder / "text_encoder_2" / "model.safetensors").unlink()


def _unknown_variants(folder: Path) -> None:
    for variant in ("a", "b"):
        name = f"diffusion_pytorch_model.{variant}.safetensors"
        shutil.copy(folder / "vae" / PLAIN, folder / "vae" / name)
    (folder / "vae" / PLAIN).unlink()


def _short(folder: Path) -> None:
    file = folder / "vae" / PLAIN
    file.write_bytes(file.read_bytes()[:-64])


def _modular(folder: Path) -> None:
    (folder / "model_index.json").rename(folder / "modular_model_index.json")


def _component(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    shutil.copy(folder / "vae" / "config.json", folder / "config.json")


def _newer_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderOfTomorrow"]
    (folder / "model_index.json").write_text(json.dumps(index))


REFUSED: dict[Callable[[Path], None], tuple[str, str]] = {
    _dangling: (f"vae/{PLAIN}", "a dangling link to ../../blobs/0123"),
    _dangling_vocabulary: ("tokenizer/tokenizer.json", "a dangling link to ../../blobs/4567"),
    _pointer: (f"vae/{PLAIN}", "a Git LFS pointer, not the file: run `git lfs pull`"),
    _pointer_of_config: ("tiny/model_index.json", "a Git LFS pointer"),
    _missing_shard: (
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json names this shard, but the folder lacks it",
    ),
    _missing_index: ("transformer", "no index of its shards .diffusion_pytorch_model-00001-of"),
    _broken_index: (
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "it has no weight_map",
    ),
    _stray_index: (f"transformer/../vae/{PLAIN}", "names this shard"),
    _pickle: ("vae", "only pickled weights .diffusion_pytorch_model.bin., which may run code"),
    _other_name: ("vae", f"no {PLAIN}; found flux1-ae.safetensors"),
    _no_weights: ("text_encoder_2", "no model.safetensors: its weights are missing"),
    _unknown_variants: ("vae", "only variants, and none of a known precision: a, b; allowed"),
    _short: ("vae", "cannot be loaded"),
    _modular: ("model_index.json", "only a modular pipeline .modular_model_index.json"),
    _component: ("model_index.json", "with config.json it is one component of a model"),
    _newer_class: ("diffusers.AutoencoderOfTomorrow", r"diffusers \d+.* has no such class"),
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_cannot_be_served_says_why(
    spoil: Callable[[Path], None], folder: Path
) -> None:
    spoil(folder)
    missing, said = REFUSED[spoil]
    with pytest.raises(LoadError, match=said) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == missing


def test_a_cache_that_cannot_be_served_says_why(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--o--n"
    as_cache(folder, root)
    with pytest.raises(LoadError, match="a hub cache of 1 repositories; name one of them: models"):
        located(str(root.parent))
    (root / "refs" / "main").write_text("ffff")
    with pytest.raises(LoadError, match="refs/main: names revision ffff, of which snapshots/ has"):
        located(str(root))
    (root / "refs" / "main").unlink()
    assert located(str(root)).folder.name == "0a1b2c", "the only one"
    (root / "snapshots" / "other").mkdir()
    with pytest.raises(LoadError, match="found 0a1b2c, other, and no refs/main"):
        located(str(root))
    with pytest.raises(LoadError, match="a file; a folder with model_index"):
        located(str(folder / "card.json"))
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(LoadError, match="a dangling link to nowhere"):
        located(str(tmp_path / "gone"))
