"""A GenerateRequest in one line: what `HocketClient` takes as keyword options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict, Unpack

from hocket.v1.generation_pb2 import GenerateRequest
from hocket.v1.types_pb2 import Commitment, DegradeLimits, GenerationSpec, OnMiss, Shape, Slo

__all__ = ["Options", "request"]


class Options(TypedDict, total=False):
    """What can be said of a request beside its prompt; what is left out is the server's default."""

    model: str
    workflow: str  # a model's own, or a registered one: "name" or "name@digest"
    inputs: Mapping[str, str]  # files that the workflow takes, each as `put_input` named it
    loras: Iterable[str]  # adapters of the model, each "name" or "name:scale"
    negative_prompt: str
    shape: tuple[int, int] | None  # width and height in pixels
    frames: int  # of a video
    fps: int  # frames per second of a video
    media_type: str  # "image/png", "image/webp" or "video/mp4"
    steps: int  # denoising steps
    seed: int | None
    guidance: float | None  # guidance scale
    deadline_s: float  # the SLO: when the result is due; it never ends a call
    on_miss: OnMiss.ValueType  # what happens when it cannot be kept
    commitment: Commitment.ValueType  # how binding a promised deadline is
    steps_min: int  # with ON_MISS_DEGRADE: how far, see DegradeLimits
    shape_min: tuple[int, int] | None  # likewise
    priority: int  # -100 to 100; higher wins
    tenant: str
    idempotency_key: str  # repeating it re-attaches; HocketClient draws one where none is given
    detached: bool  # keep running when the caller goes away
    progress_every: int  # a message at every n-th step


def request(prompt: str, **options: Unpack[Options]) -> GenerateRequest:
    """A GenerateRequest; see `Options`."""
    width, height = options.get("shape") or (0, 0)
    shape = Shape(
        width=width,
        height=height,
        frames=options.get("frames", 0),
        fps=options.get("fps", 0),
    )
    spec = GenerationSpec(
        model=options.get("model", ""),
        workflow=options.get("workflow", ""),
        inputs=options.get("inputs", {}),
        loras=options.get("loras", ()),
        prompt=prompt,
        negative_prompt=options.get("negative_prompt", ""),
        shape=shape,
        steps=options.get("steps", 0),
        seed=options.get("seed"),
        guidance_scale=options.get("guidance"),
        media_type=options.get("media_type", ""),
    )
    return GenerateRequest(
        spec=spec,
        slo=_slo(options),
        priority=options.get("priority", 0),
        tenant=options.get("tenant", ""),
        idempotency_key=options.get("idempotency_key", ""),
        detached=options.get("detached", False),
        progress_every=options.get("progress_every", 0),
    )


def _slo(options: Options) -> Slo:
    width, height = options.get("shape_min") or (0, 0)
    steps = options.get("steps_min", 0)
    limits = DegradeLimits(steps_min=steps, width_min=width, height_min=height)
    return Slo(
        deadline_us=round(options.get("deadline_s", 0.0) * 1e6),
        on_miss=options.get("on_miss", OnMiss.ON_MISS_UNSPECIFIED),
        commitment=options.get("commitment", Commitment.COMMITMENT_UNSPECIFIED),
        degrade=limits if (steps or width or height) else None,
    )
