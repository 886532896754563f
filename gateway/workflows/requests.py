"""What a request has to bring for the workflow that it names.

Pure, like `gateway.validation`, which calls it where the request names no plain chain of its model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from hocket.v1.generation_pb2 import ModelInfo
from hocket.v1.types_pb2 import GenerationSpec, Shape
from hocket.v1.workflows_pb2 import WorkflowNode, WorkflowSpec
from hocket.workflows import sizes
from hocket.workflows.catalogue import EMBEDDINGS, LATENTS, OPERATIONS, needed_operations
from hocket.workflows.content import PROMPTS, named, settings_of, source_of
from hocket.workflows.roles import lacks_role
from hocket.workflows.running import run_form

INPUT_NAME = re.compile(r"sha256:[0-9a-f]{64}")
_INPUT_SO = '"sha256:" and 64 hex digits, as PutInput named it'
Add = Callable[[str, object, str], None]  # a field, what was found, what is allowed
Serves = Callable[[ModelInfo, Shape], bool]
_OF_A_FAMILY = {EMBEDDINGS: "embeddings", LATENTS: "latents"}  # pixels are anybody's


def default_model(workflow: WorkflowSpec) -> str:
    """The model that a request means that names none: that of the last stepped node; empty where
    the workflow leaves it to the request."""
    stepped = [node.model for node in workflow.nodes if OPERATIONS[node.op].stepped]
    return stepped[-1] if stepped else ""


def given(spec: GenerationSpec) -> frozenset[str]:
    """Inputs of a workflow that a request brings."""
    prompts = (name for name in PROMPTS if getattr(spec, name))
    return frozenset((*prompts, *spec.inputs))


def check_inputs(
    spec: GenerationSpec, workflow: WorkflowSpec, absent: Collection[str], add: Add
) -> None:
    """`absent`: names of files that are not in the caller's store."""
    files = [item for item in workflow.inputs if item.name not in PROMPTS]
    known = ", ".join(item.name for item in files) or "none"
    for name in sorted(spec.inputs):
        at, value = f"spec.inputs[{name}]", spec.inputs[name]
        if name not in {item.name for item in files}:
            add(at, "no input of that name", f"{known} ({workflow.name})")
        elif not INPUT_NAME.fullmatch(value):
            add(at, repr(value), _INPUT_SO)
        elif value in absent:
            add(
                at,
                value,
                "a file that this tenant uploaded (PutInput) and is kept for long enough",
            )
    missing = [item.name for item in files if not item.optional and item.name not in spec.inputs]
    for name in missing:
        add(f"spec.inputs[{name}]", "nothing", f"an uploaded file, which {workflow.name} needs")
    if spec.negative_prompt and "negative_prompt" not in {item.name for item in workflow.inputs}:
        add("spec.negative_prompt", spec.negative_prompt, f"none ({workflow.name} takes none)")
    if not missing and set(spec.inputs) <= {item.name for item in files}:
        for fault in run_form(workflow, given(spec) | {"prompt"}).faults:
            told = f"{', '.join(sorted(spec.inputs)) or 'no files'}: {fault.description}"
            add("spec.inputs", told, f"inputs that {workflow.name} runs with ({fault.field})")


def check_models(
    spec: GenerationSpec,
    workflow: WorkflowSpec,
    models: Sequence[ModelInfo],
    serves: Serves,
    add: Add,
) -> None:
    """That every node's model is served, does its operation, and takes its size and settings."""
    spec.workflow = named(workflow)
    served = {model.name: model for model in models}
    files = [item for item in workflow.inputs if item.name not in PROMPTS]
    if spec.shape.frames > 1 and files:
        add("spec.shape.frames", spec.shape.frames, f"1 ({workflow.name} begins from pictures)")
    used = {node.model or spec.model for node in workflow.nodes if OPERATIONS[node.op].part}
    for name in sorted(used - served.keys()):
        add("spec.workflow", f"model {name}, which {workflow.name} needs", _list(served))
    shapes = sizes.shapes_of(workflow, spec.shape, [served[n] for n in sorted(used & {*served})])
    told: set[tuple[str, str]] = set()
    for node in _nodes_run(spec, workflow):
        model = served.get(node.model or spec.model)
        if model is None or not OPERATIONS[node.op].part:
            continue
        _check_node(node, model, workflow, add)
        _check_settings(node, model, spec, workflow, add)
        _check_families(node, model, spec, workflow, served, add)
        shape = shapes[node.id]
        size = f"{shape.width}x{shape.height}"
        # The request's own shape, at the request's own model, is checked without workflows, too.
        own = model.name == spec.model and shape == spec.shape
        if not own and not serves(model, shape) and (model.name, size) not in told:
            told.add((model.name, size))
            allowed = _list(f"{s.width}x{s.height}" for s in model.shapes)
            add("spec.shape", f"{size}, of node {node.id}", f"{allowed} ({model.name})")


def check_loras(spec: GenerationSpec, workflow: WorkflowSpec, add: Add) -> None:
    """That a node takes the adapters that the request names: they are of its own model."""
    models = [n.model or spec.model for n in workflow.nodes if OPERATIONS[n.op].stepped]
    if spec.loras and spec.model not in models:
        allowed = f"none ({workflow.name} denoises with {_list(dict.fromkeys(models))})"
        add("spec.loras", ", ".join(spec.loras), allowed)


def _nodes_run(spec: GenerationSpec, workflow: WorkflowSpec) -> Iterable[WorkflowNode]:
    """The nodes that run once the request brings all that it has to."""
    needed = {item.name for item in workflow.inputs if not item.optional}
    return run_form(workflow, given(spec) | needed).spec.nodes


def _check_node(node: WorkflowNode, model: ModelInfo, workflow: WorkflowSpec, add: Add) -> None:
    who = f"of node {node.id} of {workflow.name}"
    if lacks_role(model, node.op):  # which control tells, and may pass
        return
    for port, operation in needed_operations(node).items():
        if model.operations and operation not in model.operations:
            what = f"{port} {who}, which {model.name} does not take" if port else ""
            found = what or f"{operation} {who}, which {model.name} does not do"
            add("spec.workflow", found, _list(model.operations))


def _check_settings(
    node: WorkflowNode, model: ModelInfo, spec: GenerationSpec, workflow: WorkflowSpec, add: Add
) -> None:
    """Steps, guidance and negative prompt, the node's own or the request's. The request's are
    checked against the request's own model without workflows, too.
    """
    who, settings = f"of node {node.id} of {workflow.name}", settings_of(node)
    other = model.name != spec.model
    if OPERATIONS[node.op].stepped:
        own = settings.get("steps")
        steps = own or (spec.steps if other else model.steps_min)
        if not model.steps_min <= int(steps) <= model.steps_max:
            allowed = f"{model.steps_min} to {model.steps_max} ({model.name})"
            add("spec.workflow" if own else "spec.steps", f"{steps} steps {who}", allowed)
        scale = settings.get("guidance_scale")
        field = "spec.guidance_scale" if scale is None else "spec.workflow"
        if scale is None and other and model.guidance_kind != "none":
            scale = spec.guidance_scale
        if scale is not None and not model.guidance_min <= float(scale) <= model.guidance_max:
            allowed = f"{model.guidance_min:g} to {model.guidance_max:g} ({model.name})"
            add(field, f"guidance scale {scale:g} {who}", allowed)
    source = source_of(node.inputs.get("negative_prompt", ""))
    text = getattr(spec, source.input) if source is not None and source.input in PROMPTS else ""
    if text and other and model.guidance_kind != "cfg":
        allowed = f"none ({model.name}, of node {node.id}, takes no such prompt)"
        add("spec.negative_prompt", text, allowed)


def _check_families(
    node: WorkflowNode,
    model: ModelInfo,
    spec: GenerationSpec,
    workflow: WorkflowSpec,
    served: Mapping[str, ModelInfo],
    add: Add,
) -> None:
    """Embeddings and latents mean something to models of one family only."""
    nodes = {one.id: one for one in workflow.nodes}
    for port in OPERATIONS[node.op].inputs:
        source = source_of(node.inputs.get(port.name, ""))
        if port.type not in _OF_A_FAMILY or source is None or source.node not in nodes:
            continue
        maker = served.get(nodes[source.node].model or spec.model)
        if maker is None or not (maker.family and model.family) or maker.family == model.family:
            continue
        found = f"{_OF_A_FAMILY[port.type]} of {maker.name} ({maker.family}) for node {node.id}"
        add("spec.workflow", found, f"those of the family {model.family}, of {model.name}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
