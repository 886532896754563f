"""The workflows that requests may name, and what each node of one calls for a request.

A request is planned as the pass that it is in: for the planner and for policies it is a request
with one stepped node, of that pass's model, shape and steps, and with whatever comes later behind
it. So a request that names its passes is *entered* here once, and becomes one request a pass, each
with a workflow seen from that pass. Equal requests share these, by a name made from their content.
The plain chain is its own only pass.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from ..values import Pass, Request, Shape
from ..workflow import CHAIN, Node, Workflow

WORKFLOWS_MAX = 256  # beyond these, those that no request uses are dropped
COURSES_MAX = 4096  # likewise of what was entered


class UnknownWorkflow(KeyError):
    """A request names a workflow that nobody taught the scheduler."""

    def __init__(self, name: str) -> None:
        super().__init__(f"workflow {name!r} is not known")
        self.name = name


class PassesFault(ValueError):
    """A request's passes are not those of its workflow."""

    def __init__(self, request: Request, wanted: tuple[str, ...]) -> None:
        found = [p.node for p in request.passes]
        super().__init__(
            f"passes of request {request.id!r} are {found}, those of its workflow are {wanted}"
        )
        self.request = request.id
        self.wanted = wanted


class WorkflowTaken(ValueError):
    """A workflow of that name is known, with other nodes."""

    def __init__(self, name: str) -> None:
        super().__init__(f"workflow {name!r} is known with other nodes")
        self.name = name


class CallSpec(NamedTuple):
    """What a node calls for a request, as profiles and workers name it."""

    model: str  # "": it needs no weights
    op: str
    shape: Shape
    part: str  # "": none


@dataclass(frozen=True, slots=True)
class Course:
    """A workflow as requests of one model, shape and passes run it."""

    passes: tuple[Pass, ...]
    views: tuple[Workflow, ...]  # by pass; each with a name of its own
    calls: Mapping[str, CallSpec]  # by node


Key = tuple[str, str, Shape, tuple[Pass, ...]]


@dataclass(slots=True)
class Catalogue:
    """Workflows by name, bounded: what no request inside uses may be dropped."""

    known: dict[str, Workflow] = field(default_factory=lambda: {CHAIN.name: CHAIN})
    # By the name in a request that is planned: plain ones, and the passes of all others.
    views: dict[str, Workflow] = field(default_factory=lambda: {CHAIN.name: CHAIN})
    courses: dict[str, Course] = field(default_factory=dict)  # by a view's name; none of plain ones
    _entered: dict[Key, Course] = field(default_factory=dict)

    def learn(self, workflow: Workflow) -> None:
        """Requests may name it from now on. Raises: WorkflowTaken."""
        before = self.known.pop(workflow.name, None)
        if before is not None and before != workflow:
            self.known[workflow.name] = before
            raise WorkflowTaken(workflow.name)
        self.known[workflow.name] = workflow  # now the newest
        if workflow.plain:
            self.views[workflow.name] = workflow

    def trim(self, used: Container[str]) -> None:
        """Drops the oldest that are not used, once too many are known."""
        for name in [n for n in self.known if n not in used and not self.known[n].plain]:
            if len(self.known) <= WORKFLOWS_MAX:
                break
            del self.known[name]

    def enter(self, request: Request) -> tuple[Request, ...]:
        """The request as each of its passes. Raises: UnknownWorkflow, PassesFault."""
        workflow = self.known.get(request.workflow)
        if workflow is None:
            raise UnknownWorkflow(request.workflow)
        if request.passes and tuple(p.node for p in request.passes) != workflow.steppeds:
            raise PassesFault(request, workflow.steppeds)
        if workflow.plain:
            if request.passes:
                request = _as_pass(request, request.passes[0], workflow.name)
            return (request,)
        if not request.passes and len(workflow.steppeds) > 1:
            raise PassesFault(request, workflow.steppeds)
        key = (workflow.name, request.model, request.shape, request.passes or _own(request))
        course = self._entered.pop(key, None)
        if course is None or course.views[0].nodes != workflow.nodes:
            course = _course(workflow, request)
            for view in course.views:
                self.views[view.name] = view
                self.courses[view.name] = course
        self._entered[key] = course  # now the newest
        return tuple(
            [
                _as_pass(request, one, view.name)
                for one, view in zip(course.passes, course.views, strict=True)
            ]
        )

    def later(self, request: Request, node: str) -> Request:
        """A request that was entered, as the pass whose stepped node that is."""
        course = self.courses[request.workflow]
        at = course.views[0].steppeds.index(node)
        return _as_pass(request, course.passes[at], course.views[at].name)

    def forget(self, used: Iterable[str]) -> None:
        """Drops the oldest of what was entered, but the views used, once it is too much."""
        if len(self._entered) <= COURSES_MAX:
            return
        names = set(used)
        for key in list(self._entered)[: len(self._entered) - COURSES_MAX // 2]:
            views = self._entered[key].views
            if names.isdisjoint(v.name for v in views):
                del self._entered[key]
                for view in views:
                    del self.views[view.name], self.courses[view.name]


def _own(request: Request) -> tuple[Pass, ...]:
    """What stands for the passes of a request that names none."""
    return (
        Pass(
            node="",
            model=request.model,
            shape=request.shape,
            steps=request.steps,
            branches=request.branches,
        ),
    )


def _as_pass(request: Request, one: Pass, workflow: str) -> Request:
    return replace(
        request,
        model=one.model,
        shape=one.shape,
        steps=one.steps,
        branches=one.branches,
        workflow=workflow,
        passes=(),
    )


def _course(workflow: Workflow, request: Request) -> Course:
    passes = request.passes
    if not passes:
        (own,) = _own(request)
        node = workflow.node[workflow.stepped]
        passes = (replace(own, node=node.id, model=node.model or own.model),)
    by_node = {p.node: p for p in passes}
    text = "; ".join(f"{p.node} {p.model} {_size(p.shape)} {p.steps} {p.branches}" for p in passes)
    base = f"{workflow.name} of {request.model} {_size(request.shape)}: {text}"
    calls = {
        n.id: _call(n, by_node[n.id].model, by_node[n.id].shape)
        if n.id in by_node
        else _call(n, request.model, _shape(n, workflow, request.shape, by_node))
        for n in workflow.nodes
    }
    views = tuple(
        Workflow(f"{base} #{at}", workflow.nodes, at=at) for at in range(len(workflow.steppeds))
    )
    return Course(passes, views, calls)


def _call(node: Node, model: str, shape: Shape) -> CallSpec:
    return CallSpec((node.model or model) if node.part else "", node.calls, shape, node.part)


def _shape(node: Node, workflow: Workflow, shape: Shape, passes: Mapping[str, Pass]) -> Shape:
    """Of what a node makes that is called once: the request's, or that of a pass of its scale."""
    if node.scale == 1.0:
        return shape
    for stepped in workflow.steppeds:
        if workflow.node[stepped].scale == node.scale:
            return passes[stepped].shape
    width, height = (max(1, round(side * node.scale)) for side in (shape.width, shape.height))
    return replace(shape, width=width, height=height)


def _size(shape: Shape) -> str:
    return f"{shape.width}x{shape.height}x{shape.frames}"
