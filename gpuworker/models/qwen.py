"""Family "qwen": QwenImageTransformer2DModel, text to image, as diffusers' QwenImagePipeline does.

Guidance is two forwards, prompted and plain; what comes of both is scaled back to the length of the
prompted prediction. Attention runs over text and image at once, and both are split over a group.

Texts have the lengths they have. Rows whose texts differ in length are padded and masked, so that
no job is changed by its companions; a job alone needs no mask, as in the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpuworker.attention.elastic import ElasticSP, degrees
from gpuworker.models.card import Asked, CardFacts, ModelRefused
from gpuworker.models.diffusers_card import DiffusersCard
from gpuworker.models.flux import packed
from gpuworker.models.pictures import to_frames
from gpuworker.models.rows import Row, drawn, latents_of, number, timesteps_of
from gpuworker.models.solvers import dynamic_shift, schedule_steps
from gpuworker.state import LatentState

_TEMPLATE = (  # what the text encoder is told; the transformer does not get to see its beginning
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_TEMPLATE_TOKENS = 34  # before the prompt
_ENCODER_TOKENS = 1024 + _TEMPLATE_TOKENS
_TEXT_TOKENS = 512  # at most
_SIZE_MAX = 2048
_SIDE_DEFAULT = 128  # latent pixels
_BRANCHES = ("prompt_embeds", "negative_embeds")  # by PROMPTED and PLAIN
_OTHER_KINDS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenCard(DiffusersCard):
    """Qwen-Image text to image. Raises `ModelRefused` for its editing and layering kin."""

    branches_together = False
    takes_pictures = True

    def __init__(
        self, name: str, parts: dict[str, Any], card: dict[str, Any], device: torch.device
    ) -> None:
        for flag in _OTHER_KINDS:
            if parts["transformer"].config.get(flag):
                raise ModelRefused("transformer", f"{flag}: only text to image is supported")
        if "processor" in parts:
            raise ModelRefused("processor", "image editing is not supported")
        super().__init__(parts, card, device, ElasticSP(parts["transformer"], joint=True))
        self.facts = self._facts(name)

    def _blank(self, asked: Asked, generator: torch.Generator) -> dict[str, Tensor]:
        rows, columns = asked.height // self._patch_px(), asked.width // self._patch_px()
        channels = self._transformer.config.in_channels // 4
        unpacked = drawn((1, channels, 2 * rows, 2 * columns), generator).to(self._dtype)
        return {"latents": packed(unpacked)}

    def _prompted(self, prompt: str) -> dict[str, Tensor]:
        return {"prompt_embeds": self._embed(prompt)}

    @torch.inference_mode()
    def decode(self, state: LatentState) -> NDArray[np.uint8]:
        vae, (rows, columns) = self._parts["vae"], self._grid(state)
        latents = state.tensors["latents"].to(self._device)
        latents = latents.view(1, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        latents = latents.reshape(1, -1, 1, 2 * rows, 2 * columns).to(vae.dtype)
        mean, std = self._spread(latents)
        (video,) = vae.decode(latents / (1.0 / std) + mean, return_dict=False)  # [1, 3, 1, H, W]
        return to_frames(video[:, :, 0])

    def _vae_input(self, picture: Tensor) -> Tensor:
        return picture[:, :, None]

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._spread(latents)
        scaled: Tensor = (latents - mean) * (1.0 / std)
        return scaled[:, :, 0].to(self._dtype)

    def _packed(self, latents: Tensor) -> Tensor:
        return packed(latents)

    def _latent_px(self) -> int:
        return self._patch_px() // 2

    def _channels(self) -> int:
        return int(self._parts["vae"].config.z_dim)

    def _spread(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's raw latents [1, C, F, H, W], by channel."""
        config = self._parts["vae"].config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def _facts(self, name: str) -> CardFacts:
        multiple = self._patch_px()
        side = int(self._card.get("size_default", _SIDE_DEFAULT * multiple // 2))
        return CardFacts(
            name=name,
            family="qwen",
            workflows=("txt2img",),
            sizes=tuple((w, h) for w, h in self._card.get("sizes", ())),
            size_multiple=multiple,
            size_min=multiple,
            size_max=_SIZE_MAX,
            size_default=(side, side),
            frames_max=1,
            frames_multiple=1,
            frames_default=1,
            steps_min=1,
            steps_max=100,
            steps_default=50,
            guidance="true_cfg",
            guidance_min=1.0,
            guidance_max=20.0,
            guidance_default=4.0,
            degrees=degrees(self._transformer),
            examples=tuple(self._card.get("examples", ())),
        )

    def _embed(self, prompt: str) -> Tensor:
        """Qwen2.5-VL embeddings [1, T, D] of a prompt, as long as it is."""
        encoded = self._parts["tokenizer"](
            [_TEMPLATE.format(prompt)],
            max_length=_ENCODER_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        hidden: Tensor = self._parts["text_encoder"](
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            output_hidden_states=True,
        ).hidden_states[-1]
        most = int(self._card.get("text_tokens", _TEXT_TOKENS))
        return hidden[:, _TEMPLATE_TOKENS : _TEMPLATE_TOKENS + most].to(self._dtype)

    def _timing(self, state: LatentState) -> dict[str, Any]:
        steps, tokens = schedule_steps(state), state.tensors["latents"].shape[1]
        shift = dynamic_shift(tokens, self._parts["scheduler"].config)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift}

    def _predict(self, rows: Sequence[Row]) -> Tensor:
        latents = latents_of(rows)
        embeds, mask = _texts(rows)
        velocity: Tensor
        (velocity,) = self._transformer(
            hidden_states=latents,
            timestep=timesteps_of(rows).to(latents.dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *self._grid(row.state))] for row in rows],
            return_dict=False,
        )
        return velocity

    def _guide(self, state: LatentState, prompted: Tensor, plain: Tensor) -> Tensor:
        both = super()._guide(state, prompted, plain)
        wanted, found = (torch.norm(v, dim=-1, keepdim=True) for v in (prompted, both))
        return both * (wanted / found)

    def _grid(self, state: LatentState) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        height, width = int(number(state, "height")), int(number(state, "width"))
        return height // self._patch_px(), width // self._patch_px()

    def _patch_px(self) -> int:
        """Pixels of an image token's side."""
        return 2 * int(2 ** len(self._parts["vae"].temperal_downsample))


def _texts(rows: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
    """Texts [rows, T, D], zero behind their ends, and bool [rows, T]: which tokens there are.

    Without a mask where no length differs. The lengths of both branches decide, so that two halves
    of a group, which predict one branch each, make the same exchanges.
    """
    texts = [row.state.tensors[_BRANCHES[row.branch]][0] for row in rows]
    embeds = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    if not any(_lengths_differ(rows, name) for name in _BRANCHES):
        return embeds, None
    lengths = torch.tensor([len(text) for text in texts], device=embeds.device)
    return embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]


def _lengths_differ(rows: Sequence[Row], name: str) -> bool:
    return len({row.state.tensors[name].shape[1] for row in rows if name in row.state.tensors}) > 1
