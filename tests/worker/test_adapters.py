"""LoRA adapters: every published form of file, many of them in one batch, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpuworker.loading import load_card
from gpuworker.models.adapters import read_layers
from gpuworker.models.card import LORAS, Asked, ModelCard, ModelRefused, ShapeRefused
from gpuworker.state import LatentState
from tests.worker.tiny_adapters import flux_loras
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE
from tests.worker.worker_pool import CPU

Q, OUT = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny Flux with two adapters."""
    return flux_loras(tmp_path_factory.mktemp("adapters") / "tiny-flux")


@pytest.fixture
def card(made: Reference) -> ModelCard:
    """Of it."""
    return load_card(made.folder, CPU, torch.float32)


def drawn(card: ModelCard, *states: LatentState) -> list[Tensor]:
    """Latents of jobs that step together."""
    together = list(states)
    while not together[0].finished:
        together = card.step(together, None)
    return [state.tensors["latents"] for state in together]


def test_jobs_with_different_adapters_share_a_batch(made: Reference, card: ModelCard) -> None:
    """Each is what it is alone; one without any is the base's, whose weights nobody changed."""
    assert LORAS in card.operations and card.adapters == ("detail", "style")
    asked = Asked(**made.settings)
    wanted: list[Mapping[str, float]] = [{}, {"style": 0.8}, {"style": -0.3, "detail": 0.5}]
    untouched = load_card(made.folder, CPU, torch.float32)
    (plain,) = drawn(untouched, untouched.encode(*asked))
    states = [card.begin(card.embed(asked), asked, loras=loras) for loras in wanted]
    alone = [drawn(card, state)[0] for state in states]
    for one, together in zip(alone, drawn(card, *states), strict=True):
        assert float((one - together).abs().max()) <= LATENT_TOLERANCE
    assert torch.equal(alone[0], plain)
    assert not any(torch.allclose(one, plain, atol=0.01) for one in alone[1:])
    (loaded,) = drawn(untouched, LatentState.from_bytes(states[2].to_bytes()))
    assert torch.equal(loaded, alone[2]), "a worker that only steps loads what the state names"


def _low_rank(rank: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    down = torch.randn(rank, width, generator=generator)
    return down, torch.randn(height, rank, generator=generator)


def kohya() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Query, key and value in one, alpha 1 of rank 2; kohya's names."""
    down, up = _low_rank(2, 3 * 8, 8)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    weights[f"{name}.alpha"] = torch.tensor(1.0)
    parts = (0.5 * up @ down).split(8)
    return weights, {Q.replace("_q", f"_{n}"): p for n, p in zip("qkv", parts, strict=True)}


def xlabs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """XLabs' names, which know no alpha."""
    down, up = _low_rank(2, 8, 8)
    name = "double_blocks.0.processor.proj_lora1"
    return {f"{name}.down.weight": down, f"{name}.up.weight": up}, {OUT: up @ down}


def with_alpha() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Diffusers' names with alpha 4 of rank 2, and a layer without one, which gets the same."""
    down, up = _low_rank(2, 8, 8)
    weights = {f"transformer.{Q}.alpha": torch.tensor(4.0)}
    for module in (Q, OUT):
        weights[f"transformer.{module}.lora_A.weight"] = down.clone()
        weights[f"transformer.{module}.lora_B.weight"] = up.clone()
    return weights, {Q: 2 * up @ down, OUT: 2 * up @ down}


@pytest.mark.parametrize("form", [kohya, xlabs, with_alpha])
def test_published_forms_are_read(form: object, tmp_path: Path) -> None:
    assert callable(form)
    weights, expected = form()
    save_file(weights, tmp_path / "one.safetensors")
    layers = read_layers(tmp_path / "one.safetensors", "flux")
    assert layers.keys() == expected.keys()
    for module, (down, up, scaling) in layers.items():
        torch.testing.assert_close(scaling * up @ down, expected[module])


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_diffusers_own_header_says_the_alpha(tmp_path: Path, rslora: bool, scaling: float) -> None:
    down, up = _low_rank(2, 8, 8)
    weights = {f"transformer.{Q}.lora_A.weight": down, f"transformer.{Q}.lora_B.weight": up}
    header = {"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.use_rslora": rslora}
    header["transformer.alpha_pattern"] = {"attn.to_q": 6, "to_out": 8}  # type: ignore[assignment]
    told = {"lora_adapter_metadata": json.dumps(header)}
    save_file(weights, tmp_path / "one.safetensors", told)
    assert read_layers(tmp_path / "one.safetensors", "sd3")[Q].scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"text_encoder.layer.lora_A.weight": (2, 8)}, "text_encoder.layer"),
        ({f"transformer.{Q}.lora_A.weight": (2, 8)}, "lora_B.weight is missing"),
        ({f"transformer.{Q}.lora_magnitude_vector": (8,)}, "magnitude"),
        ({}, "no layers"),
    ],
)
def test_what_an_adapter_may_not_have_is_named(
    tmp_path: Path, weights: dict[str, tuple[int, ...]], reason: str
) -> None:
    file = tmp_path / "odd.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, file)
    with pytest.raises(ModelRefused, match=reason) as refused:
        read_layers(file, "sd3")
    assert refused.value.part == "loras/odd"


def test_what_does_not_fit_the_denoiser_is_named(made: Reference, card: ModelCard) -> None:
    asked = Asked(**made.settings)
    with pytest.raises(ShapeRefused) as refused:
        card.begin(card.embed(asked), asked, loras={"stile": 1.0})
    assert (refused.value.field, refused.value.allowed) == ("loras", "detail, style")
    with pytest.raises(ShapeRefused, match="finite"):
        card.begin(card.embed(asked), asked, loras={"style": float("nan")})
    folder = Path(made.folder) / "loras"
    odd = {
        "strange": f"transformer.{Q}x",
        "broken": "",
        "wide": f"transformer.{Q}",
    }
    for name, module in odd.items():
        down, up = _low_rank(2, 5, 5)
        save_file(
            {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
            folder / f"{name}.safetensors",
        )
    (folder / "broken.safetensors").write_bytes(b"no such thing")
    anew = load_card(made.folder, CPU, torch.float32)
    for name in odd:
        with pytest.raises(ModelRefused) as unfit:
            anew.begin(anew.embed(asked), asked, loras={name: 1.0})
        assert unfit.value.part == f"loras/{name}"
        (folder / f"{name}.safetensors").unlink()
