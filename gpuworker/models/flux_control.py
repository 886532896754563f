"""FLUX ControlNets: a second, smaller network that steers the denoiser by a picture.

It runs inside each step of the jobs that have a control picture, and what it says (residuals of
the denoiser's blocks) never leaves the step. Where a step is shared, its tokens are split as the
denoiser's are: each member has the residuals of its own tokens, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput

from gpuworker.attention.elastic import ElasticSP, Plan
from gpuworker.models.card import ModelRefused, ShapeRefused
from gpuworker.models.rows import Row, number, numbers_of, stacked
from gpuworker.state import LatentState

CONTROL, CONTROL_SCALE = "control.latents", "control_scale"  # tensor and fact of a state

_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_IDS = ContextParallelInput(split_dim=0, expected_dims=2)
_PLAN: Plan = {
    "": {
        "hidden_states": _TOKENS,
        "encoder_hidden_states": _TOKENS,
        "controlnet_cond": _TOKENS,
        "img_ids": _IDS,
        "txt_ids": _IDS,
    },
}


class FluxControl:
    """A FluxControlNetModel that takes latents. Raises `ModelRefused` for its other kinds."""

    def __init__(self, controlnet: Any) -> None:
        if type(controlnet).__name__ != "FluxControlNetModel":
            reason = f"{type(controlnet).__name__}: only FluxControlNetModel is supported"
            raise ModelRefused("controlnet", reason)
        for kind in ("num_mode", "conditioning_embedding_channels"):
            if controlnet.config.get(kind):
                reason = f"{kind}: only ControlNets of one kind that take latents are supported"
                raise ModelRefused("controlnet", reason)
        self._controlnet = controlnet
        self.elastic = ElasticSP(controlnet, joint=True, plan=_PLAN)

    def residuals(self, rows: Sequence[Row], given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the denoiser, `given` what it gets besides; all rows have one scale."""
        config = self._controlnet.config
        guidance = numbers_of(rows, "guidance_scale") if config.guidance_embeds else None
        double, single = self._controlnet(
            **given | {"guidance": guidance},
            controlnet_cond=stacked(rows, CONTROL),
            conditioning_scale=number(rows[0].state, CONTROL_SCALE),
        )
        return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}


def controlled(state: LatentState, control: LatentState, scale: float) -> LatentState:
    """A begun job with that control picture, latents of its shape. Raises `ShapeRefused`."""
    latents, wanted = control.tensors["latents"], state.tensors["latents"]
    if latents.shape != wanted.shape:
        raise ShapeRefused("control", list(latents.shape), f"latents of the job: {wanted.shape}")
    tensors = {**state.tensors, CONTROL: latents.to(wanted)}
    return replace(state, tensors=tensors, facts={**state.facts, CONTROL_SCALE: float(scale)})
