"""Workflows that come with the software, one TOML file each. They cannot be replaced or deleted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hocket.errors import Violation
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


def faults_of_name(name: str) -> tuple[Violation, ...]:
    """Why nobody can register a workflow of that name: one is shipped, or models have it."""
    if name not in shipped() and name not in OF_MODELS:
        return ()
    told = f"found {name!r}, which comes with the software; allowed: another name"
    return (Violation("name", told),)
