"""Tiny models that begin from a picture, and what the stock img2img and inpaint pipelines make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from PIL import Image

from tests.worker.tiny_models import (
    TEXT_TOKENS,
    Reference,
    Start,
    flux_reference,
    generator,
    of_pipeline,
)
from tests.worker.tiny_qwen import qwen_reference
from tests.worker.tiny_sd3 import reference, sd3_pipeline, sd3_reference, sd35_medium_reference

Make = Callable[[Path, float], Reference]
STRENGTH = 0.7  # of 8 steps, the last 6


def flux_img2img(folder: Path, strength: float = STRENGTH) -> Reference:
    """Flux that begins from a picture."""
    return begun(flux_reference(folder), FluxImg2ImgPipeline, strength)


def flux_inpaint(folder: Path, strength: float = STRENGTH) -> Reference:
    """Flux that makes a part of a picture anew."""
    return begun(flux_reference(folder), FluxInpaintPipeline, strength, masked=True)


def sd3_img2img(folder: Path, strength: float = STRENGTH) -> Reference:
    """SD3 that begins from a picture."""
    return begun(sd3_reference(folder), StableDiffusion3Img2ImgPipeline, strength)


def sd35_medium_img2img(folder: Path, strength: float = STRENGTH) -> Reference:
    """The same where the size shifts the schedule."""
    return begun(sd35_medium_reference(folder), StableDiffusion3Img2ImgPipeline, strength)


def sd3_inpaint(folder: Path, strength: float = STRENGTH) -> Reference:
    """SD3 that makes a part of a picture anew; its pipeline takes 16 channels of latents only."""
    made = reference(folder, sd3_pipeline(channels=16))
    begun_as_stock = begun(made, StableDiffusion3InpaintPipeline, strength, masked=True)
    # That pipeline forgets the VAE's shift when it decodes; the one from text does not.
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    config = pipeline.vae.config
    with torch.inference_mode():
        latents = begun_as_stock.latents / config.scaling_factor + config.shift_factor
        (decoded,) = pipeline.vae.decode(latents, return_dict=False)
    images = pipeline.image_processor.postprocess(decoded, output_type="np")
    return replace(begun_as_stock, frames=(images * 255).round().astype(np.uint8))


def flux_kontext(folder: Path, width: int = 28, height: int = 20) -> Reference:
    """Flux that edits a picture of that size; the result has 28x28 px."""
    plain = flux_reference(folder)
    pipeline = FluxKontextPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings, pixels = plain.settings, noisy_picture(width, height)
    arguments = {
        "image": Image.fromarray(pixels[0]),
        "max_sequence_length": TEXT_TOKENS,
        "max_area": settings["width"] * settings["height"],
        "_auto_resize": False,
        **of_pipeline(settings),
    }
    return drawn(pipeline, plain, arguments, Start(None, reference=pixels))


def flux_control(folder: Path, scale: float = 0.7) -> Reference:
    """Flux with a ControlNet of 1 + 1 blocks."""
    plain = flux_reference(folder)
    torch.manual_seed(8)
    controlnet = FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    for parameter in controlnet.parameters():  # those that begin at zero, too
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = FluxControlNetPipeline.from_pretrained(
        folder, controlnet=controlnet, low_cpu_mem_usage=False
    )
    pipeline.save_pretrained(folder)  # and loads it, for the weights to lie as they will for ours
    pipeline = FluxControlNetPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    settings = plain.settings
    control = noisy_picture(settings["width"], settings["height"], seed=4)
    arguments = {
        "control_image": Image.fromarray(control[0]),
        "controlnet_conditioning_scale": scale,
        "max_sequence_length": TEXT_TOKENS,
        **of_pipeline(settings),
    }
    return drawn(pipeline, plain, arguments, Start(None, control=control, control_scale=scale))


def qwen_img2img(folder: Path, strength: float = STRENGTH) -> Reference:
    """Qwen-Image that begins from a picture."""
    return begun(qwen_reference(folder), QwenImageImg2ImgPipeline, strength)


def qwen_inpaint(folder: Path, strength: float = STRENGTH) -> Reference:
    """Qwen-Image that makes a part of a picture anew."""
    return begun(qwen_reference(folder), QwenImageInpaintPipeline, strength, masked=True)


def begun(plain: Reference, kind: Any, strength: float, masked: bool = False) -> Reference:
    """What a stock pipeline of that kind makes of a picture, by the folder's model."""
    settings = plain.settings
    pixels = noisy_picture(settings["width"], settings["height"])
    start = Start(pixels, strength, mask_of(pixels) if masked else None)
    pipeline = kind.from_pretrained(plain.folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "image": Image.fromarray(pixels[0]),
        "strength": strength,
        "max_sequence_length": TEXT_TOKENS,
        **of_pipeline(settings),
    }
    if masked:
        arguments["mask_image"] = Image.fromarray(mask_of(pixels)[0, :, :, 0])
    if settings["negative_prompt"]:
        arguments["negative_prompt"] = settings["negative_prompt"]
    if "Qwen" in kind.__name__:
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    return drawn(pipeline, plain, arguments, start)


def drawn(pipeline: Any, plain: Reference, arguments: dict[str, Any], start: Start) -> Reference:
    """The pipeline's latents and picture."""
    seed = plain.settings
    latents = pipeline(**arguments, generator=generator(seed), output_type="latent").images
    images = pipeline(**arguments, generator=generator(seed), output_type="np").images
    frames = (images * 255).round().astype(np.uint8)
    return Reference(plain.folder, seed, latents, frames, start)


def noisy_picture(width: int, height: int, seed: int = 3) -> NDArray[np.uint8]:
    """[1, H, W, 3], smooth by patches of 4 pixels."""
    rows, columns = -(-height // 4), -(-width // 4)
    drawn = torch.randint(0, 256, (rows, columns, 3), generator=torch.Generator().manual_seed(seed))
    large = drawn.repeat_interleave(4, 0).repeat_interleave(4, 1)
    return large[None, :height, :width].to(torch.uint8).numpy()


def mask_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[1, H, W, 1]: white in an odd rectangle of the middle, grey on either side of it."""
    mask = np.zeros((*pixels.shape[:3], 1), np.uint8)
    height, width = pixels.shape[1:3]
    mask[0, height // 4 : height * 3 // 4, 5 : width // 2] = 255
    mask[0, : height // 4, 5:9], mask[0, : height // 4, 9:13] = 127, 128
    return mask
