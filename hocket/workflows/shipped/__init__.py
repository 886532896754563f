"""Workflows that come with the software, one TOML file each. They cannot be replaced or deleted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.content import digest_of
from hocket.workflows.files import read_file

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
