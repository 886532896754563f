"""Published transformers by size, with seeded random weights made where they will run.

What a step costs depends on shapes and dtypes, not on what the weights say; so nothing has to be
fetched, and no copy of 28 GB passes through the host. Text encoders are left out: their outputs are
random, too, of the right shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.flux import FluxCard
from gpuworker.models.rows import noise
from gpuworker.models.wan import WanCard

WEIGHTS_SEED = 20
_TEXT_TOKENS = 512


class MediaSize(NamedTuple):
    """Pixels, and frames (1 for a picture)."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


class TextlessFlux(FluxCard):
    """Flux whose prompt is noise of the shape that CLIP and T5 give."""

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        config, tokens = self._transformer.config, self._card["text_tokens"]
        return {
            "prompt_embeds": noise((1, tokens, config.joint_attention_dim), 1).to(self._dtype),
            "pooled": noise((1, config.pooled_projection_dim), 2).to(self._dtype),
            "txt_ids": torch.zeros(tokens, 3, dtype=self._dtype),
        }


class TextlessWan(WanCard):
    """Wan whose prompts are noise of the shape that UMT5 gives."""

    def _embed(self, prompt: str) -> Tensor:
        shape = (1, self._card["text_tokens"], self._transformer.config.text_dim)
        return noise(shape, len(prompt)).to(self._dtype)


@dataclass(frozen=True)
class Size:
    """A published model's sizes, and the shapes at which it is measured."""

    name: str  # as profiles call it
    card: type[DiffusersCard]
    transformer: type[nn.Module]
    config: Mapping[str, Any]
    vae: Callable[[], nn.Module]
    vae_float32: bool
    scheduler: Callable[[], Any]
    shapes: tuple[MediaSize, ...]
    batches: tuple[int, ...]
    guidance: float
    text_tokens: int = _TEXT_TOKENS


def _flux_scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _wan_scheduler() -> Any:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def flux_vae(widths: tuple[int, ...] = (128, 256, 512, 512), groups: int = 32) -> nn.Module:
    """The decoder of Flux, or a narrow one."""
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=groups,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _tiny_flux_vae() -> nn.Module:
    return flux_vae((8, 8, 8, 8), 4)


def _tiny_wan_vae() -> nn.Module:
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _wan_config(heads: int, ffn: int, layers: int) -> Mapping[str, Any]:
    return {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}


_IMAGES = tuple(MediaSize(side, side) for side in (512, 768, 1024, 2048))
_VIDEOS = tuple(MediaSize(w, h, n) for w, h in ((832, 480), (1280, 720)) for n in (17, 33, 81))
_TINY_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
_TINY_WAN = {**_wan_config(4, 64, 1), "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32}

SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        Size(
            name="flux.1-dev",
            card=TextlessFlux,
            transformer=FluxTransformer2DModel,
            config={"guidance_embeds": True},  # 19 + 38 blocks, 24 heads of 128: the defaults
            vae=flux_vae,
            vae_float32=False,
            scheduler=_flux_scheduler,
            shapes=_IMAGES,
            batches=(1, 2, 4, 8),
            guidance=3.5,
        ),
        Size(
            name="wan2.1-t2v-1.3b",
            card=TextlessWan,
            transformer=WanTransformer3DModel,
            config=_wan_config(12, 8960, 30),
            vae=AutoencoderKLWan,
            vae_float32=True,
            scheduler=_wan_scheduler,
            shapes=_VIDEOS,
            batches=(1, 2, 4),
            guidance=5.0,
        ),
        Size(
            name="wan2.1-t2v-14b",
            card=TextlessWan,
            transformer=WanTransformer3DModel,
            config=_wan_config(40, 13824, 40),
            vae=AutoencoderKLWan,
            vae_float32=True,
            scheduler=_wan_scheduler,
            shapes=_VIDEOS,
            batches=(1, 2),
            guidance=5.0,
        ),
    )
}
TINY: Mapping[str, Size] = {
    "tiny-flux": Size(
        name="tiny-flux",
        card=TextlessFlux,
        transformer=FluxTransformer2DModel,
        config=_TINY_FLUX,
        vae=_tiny_flux_vae,
        vae_float32=False,
        scheduler=_flux_scheduler,
        shapes=(MediaSize(64, 64),),
        batches=(1, 2),
        guidance=3.5,
        text_tokens=8,
    ),
    "tiny-wan": Size(
        name="tiny-wan",
        card=TextlessWan,
        transformer=WanTransformer3DModel,
        config=_TINY_WAN,
        vae=_tiny_wan_vae,
        vae_float32=True,
        scheduler=_wan_scheduler,
        shapes=(MediaSize(48, 32, 5),),
        batches=(1,),
        guidance=5.0,
        text_tokens=8,
    ),
}


def best_device() -> torch.device:
    """The first GPU, or the CPU with one thread."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    torch.set_num_threads(1)
    return torch.device("cpu")


def built(size: Size, device: torch.device, dtype: torch.dtype) -> DiffusersCard:
    """The card of a model of that size, on the device; the same weights at every call."""
    parts = {
        "transformer": on_device(lambda: size.transformer(**size.config), device, dtype),
        "vae": on_device(size.vae, device, torch.float32 if size.vae_float32 else dtype),
        "scheduler": size.scheduler(),
    }
    make: Any = size.card  # each family has the same constructor, which its base has not
    card: DiffusersCard = make(size.name, parts, {"text_tokens": size.text_tokens}, device)
    return card


def on_device(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A module made on the device with seeded weights, in float32 where diffusers keeps it so."""
    before = torch.get_default_dtype()
    torch.manual_seed(WEIGHTS_SEED)
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    islands = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if any(island in name.split(".") for island in islands):
            parameter.data = parameter.data.float()
    return module


def twin(module: Any) -> Any:
    """Another module over the same weights, as diffusers makes it: without anybody's hooks."""
    kind = getattr(diffusers, type(module).__name__)
    with torch.device("meta"):
        other = kind.from_config(module.config)
    other.load_state_dict(module.state_dict(), assign=True)
    owners = dict(other.named_modules())
    for name, buffer in module.named_buffers():  # those that no state dict holds, too
        owner, _, own = name.rpartition(".")
        owners[owner].register_buffer(own, buffer, persistent=False)
    return other.eval().requires_grad_(False)
