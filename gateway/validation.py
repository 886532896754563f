"""What makes a request acceptable, and what its missing fields become.

Pure: the request and the models in, the completed request out, or `InvalidRequest` with everything
that is wrong with it at once. Every violation says what was found and what is allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence

from gateway.workflows import requests as workflow_requests
from gateway.workflows.names import WantedWorkflow
from hocket import frame_counts, free_sizes, loras, media_types
from hocket.errors import InvalidRequest, Violation
from hocket.v1.generation_pb2 import GenerateRequest, ModelInfo
from hocket.v1.types_pb2 import Commitment, GenerationSpec, OnMiss, Shape

PROMPT_CHARS_MAX = 2000
DEADLINE_US_MAX = 24 * 3600 * 1_000_000
PRIORITY_MAX = 100
FPS_MAX = 120
_TENANT = re.compile(r"[A-Za-z0-9._-]{0,64}")
_KEY = re.compile(r"[A-Za-z0-9._:-]{0,128}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all but tabs and ends of lines
_FOUND_CHARS_MAX = 60
_UNSAID, _BEST_EFFORT = OnMiss.ON_MISS_UNSPECIFIED, OnMiss.ON_MISS_BEST_EFFORT
_DEGRADE = OnMiss.ON_MISS_DEGRADE
_COMMITMENTS = frozenset(Commitment.values())
_ON_MISS = {OnMiss.ON_MISS_BEST_EFFORT, OnMiss.ON_MISS_REJECT, OnMiss.ON_MISS_DEGRADE}


def completed(
    request: GenerateRequest,
    models: Sequence[ModelInfo],
    wanted: WantedWorkflow | None = None,
    absent: Collection[str] = (),
) -> GenerateRequest:
    """The request with its defaults filled in, all but the seed.

    Raises InvalidRequest with all violations. `models` is what living workers serve; the first is
    the default. `wanted`: the workflow that it names, where that is no model's own; `absent`: files
    that it names and that are not in the caller's store.
    """
    workflow = None if wanted is None else wanted.spec
    whole = GenerateRequest()
    whole.CopyFrom(request)
    violations = _Violations()
    _complete_terms(whole, violations)
    _check_prompts(whole.spec, violations)
    if workflow is not None:
        whole.spec.model = whole.spec.model or workflow_requests.default_model(workflow)
        workflow_requests.check_inputs(whole.spec, workflow, absent, violations.add)
    model = _complete_model(whole.spec, models, violations)
    if model is not None and workflow is None:
        _complete_workflow(whole.spec, model, wanted, violations)
    if model is not None:
        _complete_shape(whole.spec, model, violations)
        _complete_media_type(whole.spec, violations)
        _complete_steps(whole.spec, model, violations)
        _complete_guidance(whole.spec, model, violations)
        _check_loras(whole.spec, model, violations)
    if model is not None and workflow is not None:
        workflow_requests.check_models(whole.spec, workflow, models, serves, violations.add)
        workflow_requests.check_loras(whole.spec, workflow, violations.add)
    _check_degrade(whole, violations)
    if violations.found:
        raise InvalidRequest(tuple(violations.found))
    return whole


class _Violations:
    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, found: object, allowed: str) -> None:
        shown = str(found)
        if len(shown) > _FOUND_CHARS_MAX:
            shown = f"{shown[:_FOUND_CHARS_MAX]}…"
        self.found.append(Violation(field, f"found {shown}; allowed: {allowed}"))


def _complete_terms(request: GenerateRequest, violations: _Violations) -> None:
    if request.slo.deadline_us > DEADLINE_US_MAX:
        violations.add("slo.deadline_us", request.slo.deadline_us, f"0 to {DEADLINE_US_MAX} (24 h)")
    if request.slo.on_miss == _UNSAID:
        request.slo.on_miss = _BEST_EFFORT
    if request.slo.on_miss not in _ON_MISS:
        names = ", ".join(OnMiss.Name(value) for value in sorted(_ON_MISS))
        violations.add("slo.on_miss", request.slo.on_miss, names)
    if request.slo.commitment not in _COMMITMENTS:
        names = ", ".join(Commitment.keys())
        violations.add("slo.commitment", request.slo.commitment, names)
    if abs(request.priority) > PRIORITY_MAX:
        violations.add("priority", request.priority, f"-{PRIORITY_MAX} to {PRIORITY_MAX}")
    if not _TENANT.fullmatch(request.tenant):
        violations.add("tenant", repr(request.tenant), "at most 64 of A-Z a-z 0-9 . _ -")
    if not _KEY.fullmatch(request.idempotency_key):
        violations.add(
            "idempotency_key",
            repr(request.idempotency_key),
            "at most 128 of A-Z a-z 0-9 . _ : -",
        )
    request.progress_every = max(1, request.progress_every)


def _check_prompts(spec: GenerationSpec, violations: _Violations) -> None:
    for name, text in (("prompt", spec.prompt), ("negative_prompt", spec.negative_prompt)):
        if control := _CONTROL.search(text):
            violations.add(f"spec.{name}", repr(control[0]), "no control characters")
    allowed = f"1 to {PROMPT_CHARS_MAX} characters"
    if not spec.prompt.strip():
        violations.add("spec.prompt", "an empty prompt" if not spec.prompt else "blanks", allowed)
    if len(spec.prompt) > PROMPT_CHARS_MAX:
        violations.add("spec.prompt", f"{len(spec.prompt)} characters", allowed)
    if len(spec.negative_prompt) > PROMPT_CHARS_MAX:
        found = f"{len(spec.negative_prompt)} characters"
        violations.add("spec.negative_prompt", found, f"at most {PROMPT_CHARS_MAX} characters")


def _complete_model(
    spec: GenerationSpec, models: Sequence[ModelInfo], violations: _Violations
) -> ModelInfo | None:
    spec.model = spec.model or (models[0].name if models else "")
    for model in models:
        if model.name == spec.model:
            return model
    violations.add("spec.model", repr(spec.model), _list(model.name for model in models))
    return None


def _complete_workflow(
    spec: GenerationSpec,
    model: ModelInfo,
    wanted: WantedWorkflow | None,
    violations: _Violations,
) -> None:
    """A plain chain of the model: nothing goes in but prompts."""
    spec.workflow = spec.workflow or (model.workflows[0] if model.workflows else "")
    if spec.workflow not in model.workflows:
        known = (*model.workflows, *(wanted.known if wanted is not None else ()))
        violations.add("spec.workflow", repr(spec.workflow), _list(known))
    elif spec.inputs:
        found = ", ".join(sorted(spec.inputs))
        violations.add("spec.inputs", found, f"none ({spec.workflow} takes no files)")


def _complete_shape(spec: GenerationSpec, model: ModelInfo, violations: _Violations) -> None:
    default = model.shapes[0] if model.shapes else Shape()
    shape = spec.shape
    shape.width = shape.width or default.width
    shape.height = shape.height or default.height
    shape.frames = shape.frames or _frames(default)
    if model.HasField("frames") and not frame_counts.offers(model.frames, shape.frames):
        near = frame_counts.nearest(model.frames, shape.frames)
        allowed = f"{frame_counts.described(model.frames)}; nearest: {near}"
        violations.add("spec.shape.frames", shape.frames, allowed)
        shape.frames = near  # what else is wrong is told beside a number that is right
    if free_sizes.are_free(model) and not _is_recommended(model, shape):
        _check_size(model, shape, violations)
    offered = _offered(model, shape)
    served = next((s for s in offered if _size(s) == _size(shape)), None)
    if served is None:
        _tell_shape(shape, offered, violations)
    elif shape.frames > 1:
        shape.fps = shape.fps or served.fps
    still = shape.frames == 1
    if shape.fps > (0 if still else FPS_MAX):
        violations.add("spec.shape.fps", shape.fps, f"0 to {FPS_MAX} for videos, 0 for pictures")


def serves(model: ModelInfo, shape: Shape) -> bool:
    """Whether a model makes results of that shape."""
    return any(_size(s) == _size(shape) for s in _offered(model, shape))


def _offered(model: ModelInfo, shape: Shape) -> Sequence[Shape]:
    """The model's shapes; with the size of `shape`, and as many frames, where these are free."""
    offered: Sequence[Shape] = model.shapes
    if free_sizes.are_free(model) and free_sizes.takes(model, shape.width, shape.height):
        size = {"width": shape.width, "height": shape.height}
        offered = [Shape(**size, frames=s.frames, fps=s.fps) for s in offered]
    if not model.HasField("frames"):
        return offered
    frames = shape.frames
    return [Shape(width=s.width, height=s.height, frames=frames, fps=s.fps) for s in offered]


def _is_recommended(model: ModelInfo, shape: Shape) -> bool:
    return any((s.width, s.height) == (shape.width, shape.height) for s in model.shapes)


def _check_size(model: ModelInfo, shape: Shape, violations: _Violations) -> None:
    """Where sizes are free; a wrong one is replaced, so that what else is wrong is told beside."""
    if free_sizes.takes(model, shape.width, shape.height):
        return
    width, height = free_sizes.nearest(model, shape.width, shape.height)
    near = f"nearest: {width}x{height}"
    wrong = [
        (field, side)
        for field, side in (("width", shape.width), ("height", shape.height))
        if not free_sizes.takes_side(model, side)
    ]
    for field, side in wrong:
        allowed = f"{free_sizes.described_side(model)}; {near}"
        violations.add(f"spec.shape.{field}", side, allowed)
    if not wrong:  # each side is right, but not together
        size = f"{shape.width}x{shape.height}"
        violations.add("spec.shape", size, f"at most {model.pixels_max} pixels; {near}")
    shape.width, shape.height = width, height


def _complete_media_type(spec: GenerationSpec, violations: _Violations) -> None:
    frames = _frames(spec.shape)
    offered = media_types.offered(frames)
    spec.media_type = spec.media_type or offered[0]
    if spec.media_type not in offered:
        what = "videos" if frames > 1 else "pictures"
        violations.add("spec.media_type", repr(spec.media_type), f"{_list(offered)} for {what}")


def _tell_shape(shape: Shape, offered: Sequence[Shape], violations: _Violations) -> None:
    allowed = _list(_shape(s) for s in offered)
    if offered:
        nearest = min(offered, key=lambda s: (_distance(s, shape), _size(s)))
        allowed += f"; nearest: {_shape(nearest)}"
    known = [
        ("width", shape.width, {s.width for s in offered}),
        ("height", shape.height, {s.height for s in offered}),
        ("frames", shape.frames, {_frames(s) for s in offered}),
    ]
    wrong = [(field, value) for field, value, values in known if value not in values]
    for field, value in wrong:
        violations.add(f"spec.shape.{field}", value, allowed)
    if not wrong:  # each number is known, but not together
        violations.add("spec.shape", _shape(shape), allowed)


def _complete_steps(spec: GenerationSpec, model: ModelInfo, violations: _Violations) -> None:
    spec.steps = spec.steps or model.steps_default
    if not model.steps_min <= spec.steps <= model.steps_max:
        violations.add("spec.steps", spec.steps, f"{model.steps_min} to {model.steps_max}")


def _complete_guidance(spec: GenerationSpec, model: ModelInfo, violations: _Violations) -> None:
    if spec.negative_prompt and model.guidance_kind != "cfg":
        violations.add(
            "spec.negative_prompt",
            spec.negative_prompt,
            f"none ({model.name} takes no such prompt)",
        )
    if not spec.HasField("guidance_scale"):
        spec.guidance_scale = model.guidance_default
    scale = spec.guidance_scale
    two = model.HasField("branches_above") and scale > model.branches_above
    spec.guidance_branches = 2 if two else 1
    low, high = model.guidance_min, model.guidance_max
    if model.guidance_kind == "none":
        low = high = model.guidance_default
    if not (math.isfinite(scale) and low <= scale <= high):
        violations.add("spec.guidance_scale", scale, f"{low:g} to {high:g}")


def _check_loras(spec: GenerationSpec, model: ModelInfo, violations: _Violations) -> None:
    wrong = dict(loras.faults(spec.loras))
    for number, text in enumerate(spec.loras[: loras.COUNT_MAX + 1]):
        lora = loras.parsed(text)
        if number in wrong:
            violations.add(f"spec.loras[{number}]", repr(text), wrong[number])
        elif lora is not None and lora.name not in model.adapters:
            allowed = f"{_list(model.adapters)} ({model.name})"
            violations.add(f"spec.loras[{number}]", repr(lora.name), allowed)


def _check_degrade(request: GenerateRequest, violations: _Violations) -> None:
    limits, spec = request.slo.degrade, request.spec
    asked = request.slo.on_miss == _DEGRADE
    if asked and not (limits.steps_min or limits.width_min or limits.height_min):
        allowed = "the fewest steps or the smallest size that will do"
        violations.add("slo.degrade", "no limits with ON_MISS_DEGRADE", allowed)
    for field, found, most in (
        ("steps_min", limits.steps_min, spec.steps),
        ("width_min", limits.width_min, spec.shape.width),
        ("height_min", limits.height_min, spec.shape.height),
    ):
        if found > most:
            violations.add(f"slo.degrade.{field}", found, f"0 to {most}, which is asked for")


def _frames(shape: Shape) -> int:
    return shape.frames or 1


def _size(shape: Shape) -> tuple[int, int, int]:
    return shape.width, shape.height, _frames(shape)


def _distance(one: Shape, other: Shape) -> int:
    return sum(abs(a - b) for a, b in zip(_size(one), _size(other), strict=True))


def _shape(shape: Shape) -> str:
    frames = _frames(shape)
    return f"{shape.width}x{shape.height}" + (f"x{frames}" if frames > 1 else "")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
