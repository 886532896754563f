"""A workflow's calls made one after the other in one process, with the card alone: no mesh, no
groups, no artifacts that travel. What a mesh's files are compared with, byte for byte.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.loading import load_card
from gpuworker.models.card import Asked, ModelCard
from gpuworker.operations.pictures import fitted, resized
from gpuworker.state import LatentState
from gpuworker.steps.media import encode_media
from hocket.v1.types_pb2 import GenerationSpec
from hocket.v1.workflows_pb2 import WorkflowNode, WorkflowSpec
from hocket.workflows.content import PROMPTS, scale_of, settings_of, source_of
from hocket.workflows.graph import graph_of
from hocket.workflows.running import run_form

Made = LatentState | NDArray[np.uint8] | bytes


class OneProcess:
    """The shipped model, in float32 on one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.card: ModelCard = load_card(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)

    def file(
        self, workflow: WorkflowSpec, spec: GenerationSpec, files: Mapping[str, bytes]
    ) -> bytes:
        """What a request with these files is to be given. `spec` has every default."""
        prompts = [name for name in PROMPTS if getattr(spec, name)]
        form = run_form(workflow, {*prompts, *files})
        graph = graph_of(form.spec)
        made: dict[str, Made] = {}
        for name in graph.order:
            made[name] = self._call(graph.nodes[name], spec, files, made)
        output = source_of(workflow.output)
        assert output is not None
        found = made[output.node]
        assert isinstance(found, bytes)
        return found

    def _call(
        self,
        node: WorkflowNode,
        spec: GenerationSpec,
        files: Mapping[str, bytes],
        made: Mapping[str, Made],
    ) -> Made:
        given: dict[str, Made] = {}
        texts = {"prompt": "", "negative_prompt": ""}
        for port, text in node.inputs.items():
            source = source_of(text)
            assert source is not None
            if source.node:
                given[port] = made[source.node]
            elif source.input in PROMPTS:
                texts[port] = getattr(spec, source.input)
            else:
                given[port] = files[source.input]
        settings, scale = settings_of(node), scale_of(node)
        width, height = (round(side * scale) for side in (spec.shape.width, spec.shape.height))
        asked = Asked(
            texts["prompt"],
            texts["negative_prompt"],
            width,
            height,
            1,
            int(settings.get("steps", 0)) or spec.steps,
            float(settings.get("guidance_scale", spec.guidance_scale)),
            spec.seed + int(settings.get("seed_offset", 0)),
        )
        match node.op:
            case "load_image" | "load_mask":
                mode = "RGB" if node.op == "load_image" else "L"
                (content,) = given.values()
                assert isinstance(content, bytes)
                fit = str(settings.get("fit", "cover"))
                return fitted(Image.open(io.BytesIO(content)).convert(mode), width, height, fit)
            case "encode_prompt":
                return self.card.embed(asked)
            case "encode_image":
                return self.card.encode_image(_pixels(given["image"]), spec.seed)
            case "resize":
                return resized(_pixels(given["image"]), width, height, str(settings["method"]))
            case "decode":
                return self.card.decode(_latents(given["latents"]))
            case "make_media":
                return encode_media(_pixels(given["image"]), spec.media_type)[0]
        assert node.op == "denoise", node.op
        state = self.card.begin(
            _latents(given["embeddings"]),
            asked,
            _latents(given["latents"]) if "latents" in given else None,
            float(settings["strength"]) if "latents" in given else 1.0,
            _pixels(given["mask"]) if "mask" in given else None,
        )
        while not state.finished:
            (state,) = self.card.step([state], None)
        return state


def _pixels(made: Made) -> NDArray[np.uint8]:
    assert isinstance(made, np.ndarray)
    return made


def _latents(made: Made) -> LatentState:
    assert isinstance(made, LatentState)
    return made
