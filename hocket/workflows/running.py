"""A workflow as it is run for one request: what optional inputs it lacks is cut away, and every
setting is written out. Worked out once for each set of inputs that requests bring.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from hocket.errors import Violation
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.checking import faults
from hocket.workflows.content import filled
from hocket.workflows.graph import pruned

_KEPT_MAX = 512


class RunForm(NamedTuple):
    """Of one workflow with some inputs."""

    spec: WorkflowSpec  # not to be changed
    faults: tuple[Violation, ...]  # that the whole workflow does not have


def run_form(spec: WorkflowSpec, given: Collection[str]) -> RunForm:
    """`given`: names of the inputs that the request brings. Of a spec that has no faults."""
    known = frozenset(item.name for item in spec.inputs)
    return _run_form(spec.SerializeToString(deterministic=True), known.intersection(given))


@lru_cache(_KEPT_MAX)
def _run_form(content: bytes, given: frozenset[str]) -> RunForm:
    left = pruned(WorkflowSpec.FromString(content), given)
    return RunForm(filled(left), faults(left))
