"""Four models of one family on one worker: what their common parts save, in memory and in loading.

    python -m gpuworker.measuring.sharing compare --out bench/results/parts.json
    python -m gpuworker.measuring.sharing compare --models uses --out bench/results/parts-uses.json

The models are folders of seeded random weights: FLUX, FLUX with another VAE, FLUX with another
denoiser, and Stable Diffusion 3 with FLUX's T5 and VAE. Or one FLUX as four people publish it: for
texts, with a ControlNet, with LoRA adapters, to make pictures over. Each is a whole folder, as it
would be published. They are served by parts, and as four monoliths, each of these in processes of
its own that load all four models, then serve requests of each in turn with memory for all distinct
parts.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from gpuworker.folders.identity import FileDigests
from gpuworker.measuring.folders import tokenizer
from gpuworker.measuring.sizes import flux_vae
from gpuworker.memory.weights import MemoryDemand, WeightStore
from gpuworker.torch_executor import load_cards
from hocket.clock import steady_ns
from hocket.launching.machine import machine_kind
from hocket.tracing import spans

SETS = {
    "families": ("flux", "flux-other-vae", "flux-other-denoiser", "sd3"),
    "uses": ("txt2img", "controlnet", "lora", "img2img"),
}
NODES = ("text", "dit", "vae")
_CPU = torch.device("cpu")
_WIDTH = 512  # of text
_CLIP_WIDTH = 256
_TEXT_TOKENS = 32
_FLUX: Any = {
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "axes_dims_rope": (8, 28, 28),
    "joint_attention_dim": _WIDTH,
    "pooled_projection_dim": _CLIP_WIDTH,
    "guidance_embeds": True,
}
_MIB = 1 << 20
_TURNS = 3  # of requests, one of each model
_ROOM = 1.02  # times the distinct parts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class ApartDigests(FileDigests):
    """Takes every file for another one: each model is a monolith."""

    def of(self, file: Path) -> str:
        return str(file)


def write_models(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The four folders of a set."""
    write_flux(folder / names[0])
    (_write_uses if names == SETS["uses"] else _write_families)(folder, names)
    return tuple(str(folder / name) for name in names)


def write_flux(flux: Path) -> None:
    """FLUX, of seeded random weights."""
    torch.manual_seed(1)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip(_CLIP_WIDTH)),
        tokenizer=tokenizer(_TEXT_TOKENS),
        text_encoder_2=T5EncoderModel(
            T5Config(
                d_model=_WIDTH, d_kv=64, d_ff=2 * _WIDTH, num_layers=12, num_heads=8, vocab_size=99
            )
        ),
        tokenizer_2=tokenizer(_TEXT_TOKENS),
        transformer=_flux_transformer(),
    ).save_pretrained(flux)


def _write_uses(folder: Path, names: Sequence[str]) -> None:
    flux = folder / names[0]
    for name in names[1:]:
        shutil.copytree(flux, folder / name)
    controlled, adapted, made_over = (folder / name for name in names[1:])
    controlnet = FluxControlNetModel(num_layers=1, num_single_layers=2, **_FLUX)
    controlnet.save_pretrained(controlled / "controlnet")
    _change_index(
        controlled,
        _class_name="FluxControlNetPipeline",
        controlnet=["diffusers", "FluxControlNetModel"],
    )
    _change_index(made_over, _class_name="FluxImg2ImgPipeline")
    (adapted / "loras").mkdir()
    width, rank = _FLUX["num_attention_heads"] * _FLUX["attention_head_dim"], 16
    for name in ("style", "detail"):
        layers = {
            f"transformer.{block}.{number}.attn.to_q.lora_{side}.weight": torch.randn(shape)
            for block, count in (("transformer_blocks", 3), ("single_transformer_blocks", 6))
            for number in range(count)
            for side, shape in (("A", (rank, width)), ("B", (width, rank)))
        }
        save_file(layers, adapted / "loras" / f"{name}.safetensors")


def _write_families(folder: Path, names: Sequence[str]) -> None:
    flux = folder / names[0]
    for name, component, make in (
        (names[1], "vae", _vae),
        (names[2], "transformer", _flux_transformer),
    ):
        shutil.copytree(flux, folder / name)
        make().save_pretrained(folder / name / component)
    sd3 = folder / names[3]
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=CLIPTextModelWithProjection(_clip(_CLIP_WIDTH)),
        tokenizer=tokenizer(_TEXT_TOKENS),
        text_encoder_2=CLIPTextModelWithProjection(_clip(_CLIP_WIDTH)),
        tokenizer_2=tokenizer(_TEXT_TOKENS),
        text_encoder_3=None,
        tokenizer_3=tokenizer(_TEXT_TOKENS),
        transformer=_sd3_transformer(),
    ).save_pretrained(sd3)
    shutil.copytree(flux / "text_encoder_2", sd3 / "text_encoder_3")
    shutil.copytree(flux / "vae", sd3 / "vae", dirs_exist_ok=True)
    _change_index(sd3, text_encoder_3=["transformers", "T5EncoderModel"])


def _change_index(folder: Path, **entries: object) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def loaded(sources: Sequence[str], digests: FileDigests) -> dict[str, Any]:
    """What having all models takes: opening them, and reading every part into memory."""
    began = _Spent()
    store = WeightStore(_CPU)
    load_cards(tuple(sources), _CPU, store, digests=digests)
    sizes = [fact.size_bytes for fact in store.facts()]
    found = {
        "parts": len(sizes),
        "resident_mib": sum(sizes) / _MIB,
        "open_cpu_s": began.cpu_s(),
        "open_s": began.wall_s(),
        "hashed_mib": digests.hashed_bytes / _MIB,
    }
    store = WeightStore(_CPU, sum(sizes) + 1)
    load_cards(tuple(sources), _CPU, store, digests=digests)
    began = _Spent()
    store.start(lambda _: 0)
    found |= {"read_cpu_s": began.cpu_s(), "read_s": began.wall_s()}
    store.close()
    return found


def served(sources: Sequence[str], digests: FileDigests, budget_bytes: int) -> dict[str, Any]:
    """Requests of each model in turn, in a memory of `budget_bytes`."""
    store = WeightStore(_CPU, budget_bytes)
    load_cards(tuple(sources), _CPU, store, digests=digests)
    store.start(lambda _: 0)
    at_start, began, waited_us, loaded_bytes, sequence = store.loads, _Spent(), 0, 0, 0
    for _ in range(_TURNS):
        for source in sources:
            model = Path(source).name
            for node in NODES:
                sequence += 1
                with store.use(MemoryDemand((1, sequence), (model, node), 0)) as told:
                    loaded_bytes += sum(int(str(note.attributes[spans.BYTES])) for note in told)
                    waited_us += sum(int(str(n.attributes[spans.WAITED_US])) for n in told)
    store.close()
    return {
        "requests": _TURNS * len(sources),
        "loads": store.loads - at_start,
        "evictions": store.evictions,
        "loaded_mib": loaded_bytes / _MIB,
        "waited_s": waited_us / 1e6,
        "cpu_s": began.cpu_s(),
    }


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/parts.json"
    ),
    rounds: Annotated[int, typer.Option(help="Processes of each kind.", min=1)] = 3,
    models: Annotated[str, typer.Option(help=f"Which four: {' or '.join(SETS)}.")] = "families",
) -> None:
    """Parts against monoliths; medians of several processes each, taken in turn."""
    if models not in SETS:
        raise typer.BadParameter(f"{models!r}; allowed: {', '.join(SETS)}", param_hint="--models")
    kinds: dict[str, list[dict[str, Any]]] = {"parts": [], "monoliths": []}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), SETS[models])
        first = _one(folder, models, "parts")  # hashes the files, and warms the page cache
        for _ in range(rounds):
            for kind, runs in kinds.items():
                runs.append(_one(folder, models, kind))
    table = {kind: _medians(runs) for kind, runs in kinds.items()}
    content = {
        "command": f"python -m gpuworker.measuring.sharing compare --models {models} "
        f"--rounds {rounds}",
        "machine": machine_kind(),
        "models": SETS[models],
        "first_start": first["load"],
        **table,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n")
    for section in ("load", "serve"):
        for name, value in table["parts"][section].items():
            other = table["monoliths"][section][name]
            print(f"{section} {name:14}{value:10.2f} by parts{other:10.2f} as monoliths")


@app.command(hidden=True)
def one(folder: Path, models: str, kind: str) -> None:
    """One process: prints JSON."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sources = [str(folder / name) for name in SETS[models]]
    make: Callable[[], FileDigests] = (
        ApartDigests if kind == "monoliths" else lambda: FileDigests(folder / "digests.json")
    )
    distinct = WeightStore(_CPU)
    found = loaded(sources, make())
    load_cards(tuple(sources), _CPU, distinct, digests=FileDigests(folder / "digests.json"))
    budget_bytes = int(_ROOM * sum(fact.size_bytes for fact in distinct.facts()))
    del distinct
    serve = served(sources, make(), budget_bytes)
    print(json.dumps({"load": found, "serve": {"budget_mib": budget_bytes / _MIB, **serve}}))


class _Spent:
    """Time since it was made."""

    def __init__(self) -> None:
        self._wall_ns, self._cpu_s = steady_ns(), _cpu_s()

    def wall_s(self) -> float:
        return (steady_ns() - self._wall_ns) / 1e9

    def cpu_s(self) -> float:
        return _cpu_s() - self._cpu_s


def _one(folder: str, models: str, kind: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpuworker.measuring.sharing", "one", folder, models, kind]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return answer


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        section: {
            name: round(statistics.median(run[section][name] for run in runs), 3)
            for name in runs[0][section]
        }
        for section in runs[0]
    }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _vae() -> Any:
    return flux_vae((32, 64, 64, 64), 16)


def _flux_transformer() -> Any:
    return FluxTransformer2DModel(num_layers=3, num_single_layers=6, **_FLUX)


def _sd3_transformer() -> Any:
    return SD3Transformer2DModel(
        sample_size=64,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=8 * 64,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        pos_embed_max_size=64,
    )


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=4,
        vocab_size=99,
        projection_dim=width,
        max_position_embeddings=_TEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=1,
    )


if __name__ == "__main__":
    app()
