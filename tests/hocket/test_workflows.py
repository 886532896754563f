"""Workflow files: what is read, what is wrong with them, what of them is the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hocket.cli.__main__ import app
from hocket.errors import InvalidRequest
from hocket.v1.generation_pb2 import ModelInfo
from hocket.v1.types_pb2 import Shape
from hocket.v1.workflows_pb2 import PortType, WorkflowNode, WorkflowSpec
from hocket.workflows import sizes
from hocket.workflows.catalogue import OPERATIONS
from hocket.workflows.checking import NODES_MAX, faults
from hocket.workflows.content import digest_of, filled, named, parsed_name, settings_of
from hocket.workflows.drawing import drawn, mermaid
from hocket.workflows.files import read_file, read_text, to_document
from hocket.workflows.graph import pruned
from hocket.workflows.shipped import shipped


def two_pass() -> WorkflowSpec:
    return copied(shipped()["two-pass"])


def copied(spec: WorkflowSpec) -> WorkflowSpec:
    made = WorkflowSpec()
    made.CopyFrom(spec)
    return made


def node(spec: WorkflowSpec, name: str) -> WorkflowNode:
    return next(node for node in spec.nodes if node.id == name)


def test_shipped_workflows_are_sound_and_say_what_they_do() -> None:
    found = shipped()
    assert set(found) == {"control", "edit", "img2img", "inpaint", "two-pass", "upscale-twice"}
    for name, spec in found.items():
        assert spec.name == name and spec.shipped and len(spec.digest) == 64
        assert not faults(spec) and not faults(filled(spec))
        assert spec.description and all(item.description for item in spec.inputs)
        assert "n_media --> result" in mermaid(spec) and drawn(spec).children
        assert not {"txt2img", "txt2vid"} & {name}, "models have workflows of these names"


# Each fault that a change brings, by its path, and words that tell of it.
def _cycle(spec: WorkflowSpec) -> None:
    node(spec, "first").inputs["latents"] = "encode.latents"
    node(spec, "encode").settings["scale"].number_value = 0.5
    node(spec, "enlarge").settings["scale"].number_value = 0.5


def _idle(spec: WorkflowSpec) -> None:
    spec.nodes.add(id="idle", op="decode", inputs={"latents": "denoise.latents"})


def _many(spec: WorkflowSpec) -> None:
    for number in range(NODES_MAX):
        spec.nodes.add(id=f"n{number}", op="decode")


def _steps(spec: WorkflowSpec) -> None:
    last = "denoise"
    for number in range(8):
        again = spec.nodes.add(id=f"again{number}", op="denoise")
        again.inputs["embeddings"] = "text.embeddings"
        again.inputs["latents"] = f"{last}.latents"
        last = again.id
    node(spec, "decode").inputs["latents"] = f"{last}.latents"


def _no_steps(spec: WorkflowSpec) -> None:
    kept = [node(spec, name) for name in ("media",)]
    loads = WorkflowNode(id="load", op="load_image", inputs={"image": "$image"})
    kept[0].inputs["image"] = "load.image"
    nodes = [copied_node(one) for one in (*kept, loads)]
    del spec.nodes[:], spec.inputs[:]
    spec.nodes.extend(nodes)
    spec.inputs.add(name="image", type=PortType.PORT_TYPE_FILE)


def copied_node(one: WorkflowNode) -> WorkflowNode:
    made = WorkflowNode()
    made.CopyFrom(one)
    return made


def _set(name: str, setting: str, value: object) -> Callable[[WorkflowSpec], None]:
    def change(spec: WorkflowSpec) -> None:
        kind = {str: "string_value", bool: "bool_value"}.get(type(value), "number_value")
        setattr(node(spec, name).settings[setting], kind, value)

    return change


def _feed(name: str, port: str, text: str) -> Callable[[WorkflowSpec], None]:
    def change(spec: WorkflowSpec) -> None:
        node(spec, name).inputs[port] = text

    return change


def _mask(spec: WorkflowSpec) -> None:
    node(spec, "denoise").inputs["mask"] = "enlarge.image"


def _control_beside_reference(spec: WorkflowSpec) -> None:
    for port in ("reference", "control"):
        node(spec, "denoise").inputs[port] = "encode.latents"


def _image_of_a_mask(spec: WorkflowSpec) -> None:
    spec.inputs.add(name="mask", type=PortType.PORT_TYPE_FILE)
    spec.nodes.add(id="m", op="load_mask", inputs={"mask": "$mask"})
    node(spec, "encode").inputs["image"] = "m.mask"


FAULTS: list[tuple[str, Callable[[WorkflowSpec], object], str]] = [
    ("name", lambda s: setattr(s, "name", "Two Pass"), "a letter first"),
    ("description", lambda s: setattr(s, "description", "a\nb"), "one line"),
    ("inputs[0].name", lambda s: setattr(s.inputs[0], "name", "9"), "a letter first"),
    ("inputs[1].name", lambda s: setattr(s.inputs[1], "name", "prompt"), "each name once"),
    ("inputs[0].type", lambda s: setattr(s.inputs[0], "type", 2), "TEXT (a text of the request)"),
    ("inputs[2]", lambda s: s.inputs.add(name="x", type=2), "inputs in use"),
    ("nodes[1].id", lambda s: setattr(s.nodes[1], "id", "text"), "nodes[0] has it"),
    ("nodes[1].id", lambda s: setattr(s.nodes[1], "id", "a.b"), "a letter first"),
    ("nodes[1].op", lambda s: setattr(s.nodes[1], "op", "paint"), "load_image"),
    ("nodes[3].model", lambda s: setattr(s.nodes[3], "model", "m"), "needs no weights"),
    ("nodes[1].inputs.picture", _feed("first", "picture", "x.y"), "embeddings, latents, mask"),
    ("nodes[5].inputs.control", _control_beside_reference, "nothing beside reference"),
    ("nodes[1].settings.control_scale", _set("first", "control_scale", 0.5), "inputs.control"),
    ("nodes[2].inputs.latents", _feed("sketch", "latents", "text"), "node.port"),
    ("nodes[2].inputs.latents", _feed("sketch", "latents", "nobody.latents"), "first"),
    ("nodes[2].inputs.latents", _feed("sketch", "latents", "first.image"), "first.latents"),
    ("nodes[2].inputs.latents", _feed("sketch", "latents", "text.embeddings"), "first.latents"),
    ("nodes[2].inputs.latents", _feed("sketch", "latents", "$prompt"), "LATENTS"),
    ("nodes[0].inputs.prompt", _feed("text", "prompt", "$text"), "$prompt"),
    ("nodes[2].inputs.latents", lambda s: s.nodes[2].inputs.clear(), "which decode needs"),
    ("nodes[1].settings.fit", _set("first", "fit", "cover"), "scale, steps, strength"),
    ("nodes[1].settings.steps", _set("first", "steps", 1001), "of 0 to 1000"),
    ("nodes[1].settings.steps", _set("first", "steps", 1.5), "a whole number"),
    ("nodes[1].settings.steps", _set("first", "steps", True), "a whole number"),
    ("nodes[1].settings.scale", _set("first", "scale", 0), "more than 0 and at most 1"),
    ("nodes[1].settings.strength", _set("first", "strength", 0.5), "without inputs.latents"),
    ("nodes[3].settings.method", _set("enlarge", "method", "area"), "lanczos, bicubic, nearest"),
    ("nodes[5].inputs.mask", _mask, "a mask, as load_mask makes it"),
    ("nodes[4].inputs.image", _image_of_a_mask, "allowed: a picture"),
    ("nodes[1].inputs.mask", _feed("first", "mask", "enlarge.image"), "nothing without latents"),
    ("nodes[4].inputs.image", _feed("encode", "image", "sketch.image"), "put a resize between"),
    ("output", _set("media", "scale", 0.5), "that of its result"),
    ("output", lambda s: setattr(s, "output", "decode.image"), "media.media"),
    ("output", lambda s: setattr(s, "output", ""), "media.media"),
    ("output", lambda s: setattr(s.inputs[0], "optional", True), "which needs optional inputs"),
    ("nodes[1].inputs", _cycle, "first -> sketch -> enlarge -> encode -> first"),
    ("nodes[8]", _idle, "whose output goes nowhere"),
    ("nodes", _many, "1 to 64"),
    ("nodes", _steps, "10 stepped nodes"),
    ("nodes", _no_steps, "0 stepped nodes"),
]


@pytest.mark.parametrize(("path", "change", "told"), FAULTS)
def test_each_fault_is_told_with_its_path(
    path: str, change: Callable[[WorkflowSpec], object], told: str
) -> None:
    spec = two_pass()
    change(spec)
    found = {fault.field: fault.description for fault in faults(spec)}
    assert path in found, found
    assert told in found[path] and found[path].startswith("found "), found[path]


def test_all_faults_come_at_once() -> None:
    spec = two_pass()
    for path in ("nodes[1].settings.steps", "nodes[3].model", "output", "name"):
        next(change for at, change, _ in FAULTS if at == path)(spec)
    fields = [fault.field for fault in faults(spec)]
    assert {"name", "nodes[1].settings.steps", "nodes[3].model", "output"} <= set(fields)
    assert not faults(two_pass()) and faults(WorkflowSpec()) and len(fields) == len(set(fields))


@given(st.data())
def test_no_spec_breaks_the_checks(data: st.DataObject) -> None:
    """Faults are told, whatever is said; what has none can be filled in, digested, cut, drawn."""
    spec = two_pass()
    words = st.sampled_from(["first", "text.embeddings", "encode.latents", "$prompt", "", "a.b"])
    for _ in range(data.draw(st.integers(0, 4))):
        one = data.draw(st.sampled_from(list(spec.nodes)))
        match data.draw(st.integers(0, 4)):
            case 0:
                one.id = data.draw(words)
            case 1:
                one.op = data.draw(st.sampled_from([*OPERATIONS, "paint"]))
            case 2:
                one.inputs[data.draw(st.sampled_from(["latents", "mask"]))] = data.draw(words)
            case 3:
                one.settings["scale"].number_value = data.draw(st.sampled_from([0.5, 1.0, 7.0]))
            case _:
                spec.inputs[0].optional = data.draw(st.booleans())
    if faults(spec):
        return
    assert digest_of(filled(spec)) == digest_of(spec)
    assert not faults(pruned(spec, {item.name for item in spec.inputs}))
    assert drawn(spec).children and mermaid(spec)


def test_what_means_the_same_has_the_same_digest() -> None:
    spec = two_pass()
    other = copied(spec)
    nodes = [copied_node(one) for one in reversed(spec.nodes)]
    del other.nodes[:]
    other.nodes.extend(nodes)
    other.name, other.shipped, other.digest = "another", False, ""
    node(other, "first").settings["steps"].number_value = 0
    assert digest_of(other) == digest_of(spec) == spec.digest
    node(other, "first").settings["steps"].number_value = 4
    assert digest_of(other) != spec.digest
    assert named(spec) == f"two-pass@{spec.digest[:16]}"
    assert parsed_name(named(spec)) == ("two-pass", spec.digest[:16])
    assert parsed_name("two-pass@1234567") is None and parsed_name("Two") is None
    assert settings_of(node(spec, "text")) == {"scale": 1.0}
    assert settings_of(node(spec, "first")) == {
        "scale": 0.5,
        "steps": 0,
        "strength": 1.0,
        "seed_offset": 0,
        "control_scale": 1.0,
    }


def test_optional_inputs_that_are_not_given_take_their_nodes_along() -> None:
    spec = copied(shipped()["inpaint"])
    spec.inputs[3].optional = True
    assert spec.inputs[3].name == "mask" and not faults(spec)
    left = pruned(spec, {"prompt", "image"})
    assert not faults(left) and "mask" not in {one.id for one in left.nodes}
    assert dict(node(left, "denoise").inputs).keys() == {"embeddings", "latents"}
    assert dict(node(left, "text").inputs) == {"prompt": "$prompt"}
    assert pruned(spec, {"prompt", "negative_prompt", "image", "mask"}).nodes == spec.nodes


def test_nodes_of_one_scale_have_one_size() -> None:
    models = [ModelInfo(shapes=[Shape(width=w, height=h) for w, h in ((128, 64), (96, 160))])]
    assert sizes.multiple_of(models[0]) == 32 and sizes.multiple_of(ModelInfo()) == 1
    made = sizes.shapes_of(two_pass(), Shape(width=96, height=160, frames=1), models)
    assert (made["media"].width, made["media"].height) == (96, 160)
    assert (made["first"].width, made["first"].height, made["first"].frames) == (64, 96, 1)


TOML = """
description = "one"
output = "media.media"
[inputs.prompt]
type = "text"
[[nodes]]
id = "text"
op = "encode_prompt"
inputs = { prompt = "$prompt" }
[[nodes]]
id = "denoise"
op = "denoise"
settings = { steps = 8 }
[nodes.inputs]
embeddings = "text.embeddings"
[[nodes]]
id = "decode"
op = "decode"
inputs = { latents = "denoise.latents" }
[[nodes]]
id = "media"
op = "make_media"
inputs = { image = "decode.image" }
"""


def test_files_are_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "my-own.toml").write_text(TOML)
    spec = read_file(tmp_path / "my-own.toml")
    assert spec.name == "my-own" and node(spec, "denoise").settings["steps"].number_value == 8
    for one in (spec, *shipped().values()):
        text = json.dumps(to_document(one))
        again = read_text(text, Path("x.json"))
        assert again.name == one.name and digest_of(again) == digest_of(one)


@pytest.mark.parametrize(
    ("old", "new", "field", "told"),
    [
        ("steps = 8", "steps = -8", "nodes[1].settings.steps", "of 0 to 1000 (line 13)"),
        ("steps = 8", "steps = [8]", "nodes[1].settings.steps", "a number or a text (line 13)"),
        ('embeddings = "text', 'embeddings = "txt', "nodes[1].inputs.embeddings", "(line 15)"),
        ('op = "decode"', "op = 7", "nodes[2].op", "found 7; allowed: a text (line 18)"),
        ('op = "decode"', 'operation = "decode"', "nodes[2].operation", "id, op, model"),
        ('type = "text"', 'type = "words"', "inputs[0].type", "text, file (line 5)"),
        ("[inputs.prompt]", "[input.prompt]", "input", "name, description, inputs"),
        ('output = "media.media"', "", "output", "found nothing; allowed: a FILE"),
        ('description = "one"', 'description = "one', "f.toml", "line 2"),
        ('description = "one"', "nodes = 3", "f.toml", "line"),
    ],
)
def test_faults_of_files_have_lines(old: str, new: str, field: str, told: str) -> None:
    assert old in TOML
    with pytest.raises(InvalidRequest) as caught:
        read_text(TOML.replace(old, new, 1), Path("f.toml"))
    found = {fault.field: fault.description for fault in caught.value.violations}
    assert field in found and told in found[field], found


def test_what_is_no_workflow_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "big.toml").write_text("#" * (257 << 10))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "half.json").write_text('{"name":')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "w.yaml").write_text("a: b")
    for name, told in {
        "big.toml": "a smaller file",
        "bytes.toml": "text",
        "deep.json": "JSON|tables in tables",
        "half.json": "line 1",
        "list.json": "a table",
        "w.yaml": ".toml or .json",
        "none.toml": "can be read",
    }.items():
        with pytest.raises(InvalidRequest) as caught:
            read_file(tmp_path / name)
        assert re.search(told, str(caught.value)), (name, str(caught.value))


def test_the_check_command_asks_nobody(tmp_path: Path) -> None:
    for name, told in {"own": "own@", "two-pass": "comes with the software"}.items():
        file = tmp_path / f"{name}.toml"
        file.write_text(TOML)
        result = CliRunner().invoke(app, ["workflows", "check", str(file)])
        assert told in result.output and result.exit_code == (name != "own"), result.output
    (tmp_path / "own.toml").write_text(TOML.replace("steps = 8", "steps = -8"))
    result = CliRunner().invoke(app, ["workflows", "check", str(tmp_path / "own.toml")])
    assert result.exit_code == 1 and "(line 13)" in " ".join(result.output.split())
