"""What each operation makes of a job's inputs: one function by operation, in one table.

A once-call's makes an artifact, or the frames of a file; a stepped call's makes the state before
its first step. What a call makes depends on its inputs, its settings and the request alone, so that
every member of a group makes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpuworker.models.card import Asked, ModelCard
from gpuworker.operations.names import OperationRefused, model_of, settings_of, shape_of
from gpuworker.operations.pictures import Pixels, fitted, read_picture, resized
from gpuworker.state import LatentState
from hocket import loras
from hocket.v1 import mesh_pb2, types_pb2

_PIXELS = "pixels"
_SEEDS = 1 << 64


@dataclass(frozen=True)
class JobCall:
    """One job of an assignment, with all that its call takes."""

    member: mesh_pb2.BatchMember
    card: ModelCard | None  # None: the operation needs no weights
    inputs: Mapping[str, LatentState]  # by port
    files: Mapping[str, bytes] = field(default_factory=dict)  # by port
    fps: int = 0  # of its model; 0: not known, or pictures

    @property
    def spec(self) -> types_pb2.GenerationSpec:
        """What was asked for."""
        return self.member.spec

    @property
    def shape(self) -> types_pb2.Shape:
        """Of what is made."""
        return shape_of(self.member)

    @property
    def settings(self) -> dict[str, Any]:
        """Of its call, by name, as the catalogue has them. Raises `OperationRefused`."""
        return settings_of(self.member.call.op, self.member.call.settings)

    @property
    def model(self) -> ModelCard:
        """The card of an operation that needs one."""
        assert self.card is not None, self.member.call.op
        return self.card

    def input(self, port: str) -> LatentState:
        """Raises `OperationRefused` where the call has none of that name."""
        if port not in self.inputs:
            raise OperationRefused(f"inputs.{port}", "missing", "an artifact")
        return self.inputs[port]

    def text(self, port: str) -> str:
        """A text that the request brought; empty: it brought none."""
        return next((i.text for i in self.member.call.inputs if i.port == port), "")

    @property
    def loras(self) -> dict[str, float]:
        """Scales of the denoiser's adapters by name: the request's, which are of its own model.
        Raises `OperationRefused`.
        """
        if model_of(self.member) != self.spec.model:
            return {}
        for number, allowed in loras.faults(self.spec.loras):
            raise OperationRefused(f"loras[{number}]", self.spec.loras[number][:64], allowed)
        return dict(lora for lora in map(loras.parsed, self.spec.loras) if lora is not None)

    def asked(self, **changed: Any) -> Asked:
        """The request's settings at the call's shape."""
        spec, shape = self.spec, self.shape
        frames, scale = max(1, shape.frames), float(spec.guidance_scale)
        asked = Asked(
            spec.prompt,
            spec.negative_prompt,
            shape.width,
            shape.height,
            frames,
            spec.steps,
            scale,
            spec.seed,
        )
        return asked._replace(**changed)


def chain_encode(job: JobCall) -> LatentState:
    """The plain chain's first state."""
    state = job.model.encode(**job.asked()._asdict())
    return job.model.adapted(state, job.loras) if job.loras else state


def begin(job: JobCall) -> LatentState:
    """The state before the first step of a denoise call, or of the plain chain's."""
    if not job.member.HasField("call"):
        return job.input("latents")
    settings, spec = job.settings, job.spec
    asked = job.asked(
        steps=int(settings["steps"]) or spec.steps,
        guidance_scale=float(settings.get("guidance_scale", spec.guidance_scale)),
        seed=(spec.seed + int(settings["seed_offset"])) % _SEEDS,
    )
    mask = job.inputs.get("mask")
    return job.model.begin(
        job.input("embeddings"),
        asked,
        job.inputs.get("latents"),
        float(settings["strength"]) if "latents" in job.inputs else 1.0,
        None if mask is None else pixels_of(mask),
        job.inputs.get("reference"),
        job.loras,
        job.inputs.get("control"),
        float(settings["control_scale"]),
    )


def encode_prompt(job: JobCall) -> LatentState:
    """Embeddings of the prompts that the call names: they serve any number of steps and guidance,
    also such as this call's model has not, but another that takes them.
    """
    prompts = {name: job.text(name) for name in ("prompt", "negative_prompt")}
    facts = job.model.facts
    any_steps = {"steps": facts.steps_default, "guidance_scale": facts.guidance_default}
    return job.model.embed(job.asked(**prompts, **any_steps))


def encode_image(job: JobCall) -> LatentState:
    """Latents of a picture."""
    return job.model.encode_image(pixels_of(job.input("image")), job.spec.seed)


def load_image(job: JobCall) -> LatentState:
    """The request's picture at the call's size."""
    return _loaded(job, "image", "RGB")


def load_mask(job: JobCall) -> LatentState:
    """The request's mask at the call's size: one channel."""
    return _loaded(job, "mask", "L")


def resize(job: JobCall) -> LatentState:
    """Pixels at another size."""
    pixels, method = pixels_of(job.input("image")), job.settings["method"]
    return pixels_artifact(resized(pixels, job.shape.width, job.shape.height, method))


MAKERS: dict[str, Callable[[JobCall], LatentState]] = {
    "text": chain_encode,
    "load_image": load_image,
    "load_mask": load_mask,
    "encode_prompt": encode_prompt,
    "encode_image": encode_image,
    "resize": resize,
}


def pixels_artifact(pixels: Pixels) -> LatentState:
    """Pixels, uint8 [frames, height, width, channels], as an artifact: on the host."""
    frames, height, width, _ = pixels.shape
    tensor = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return LatentState({_PIXELS: tensor}, 0, 0, dict(width=width, height=height, frames=frames))


def pixels_of(state: LatentState) -> Pixels:
    """What `pixels_artifact` was given. Raises `OperationRefused` for another kind of artifact."""
    if _PIXELS not in state.tensors:
        raise OperationRefused("input", ", ".join(state.tensors), _PIXELS)
    pixels: Pixels = state.tensors[_PIXELS].cpu().numpy()
    return pixels


def _loaded(job: JobCall, port: str, mode: str) -> LatentState:
    if port not in job.files:
        raise OperationRefused(f"inputs.{port}", "missing", "a file that the request brought")
    picture, fit = read_picture(job.files[port], mode), job.settings.get("fit", "cover")
    return pixels_artifact(fitted(picture, job.shape.width, job.shape.height, fit))
