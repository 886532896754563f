"""Workflows that come with the software, one TOML file each. They cannot be replaced or deleted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.content import digest_of
from hocket.workflows.files import read_file

OF_MODELS = ("txt2img", "txt2vid")  # their plain chains
_FOLDER = Path(__file__).parent


@cache
def shipped() -> dict[str, WorkflowSpec]:
    """By name; not to be changed by whoever gets them."""
    found = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        spec = read_file(path)
        spec.digest, spec.shipped = digest_of(spec), True
        found[spec.name] = spec
    return found


def is_reserved(name: str) -> bool:
    """Whether nobody can register a workflow of that name: one is shipped, or models have it."""
    return name in shipped() or name in OF_MODELS
