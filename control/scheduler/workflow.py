"""A workflow: the calls that a request is made of, and the artifacts that pass between them.

    text ── embeddings ──▶ dit ── latents ──▶ vae ── media        CHAIN, the simplest instance
    (once)                 (stepped)          (once)

A *node* is a call of a *part* (weights that are loaded as one), or of no part. A node of kind
`once` is one call; a `stepped` node is called once a denoising step, and its latents after k
steps are version k of one artifact. A node is ready when all its inputs exist.

Stepped nodes are passed through one after the other, in order, and a workflow is seen from one of
these *passes* (`passes`). Its stepped node divides the others: those *before* it, without which it
cannot begin and that no earlier pass needs; those *after* it, once the last pass is reached.

    text ─▶ [base] ─▶ vae ─▶ resize ─▶ encode ─▶ [refine] ─▶ vae2 ─▶ media
    ╰ before ╯        ╰───────── before ────────╯            ╰── after ──╯
    ╰─ pass 0 ─────╯  ╰─ pass 1 ─────────────────────────────────────────╯

A workflow is a frozen value. What is asked of it in every plan (followers, places, the order) is
worked out once, when it is made; nothing here knows a request.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple

from .values import DIT, TEXT, VAE

STEPPED_MAX = 8  # stepped nodes of one workflow


class NodeKind(StrEnum):
    """How often a node is called for one request."""

    ONCE = "once"
    STEPPED = "stepped"  # once a denoising step, from the step before it


class ArtifactType(StrEnum):
    """What an artifact is."""

    EMBEDDINGS = "embeddings"
    LATENTS = "latents"
    PIXELS = "pixels"
    MEDIA = "media"  # files, as clients get them


class Degrees(StrEnum):
    """How many workers share one call of a node."""

    ONE = "one"
    OFFERED = "offered"  # any degree that the workers with its part offer


class Section(IntEnum):
    """Where a node stands in a request's time. Ascending: what comes first is less."""

    BEFORE = 0  # the stepped node needs it, directly or not; or an earlier pass
    STEPPED = 1  # of the pass that the workflow is seen from
    AFTER = 2  # all others


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a node makes for one request."""

    name: str  # within its workflow
    type: ArtifactType


@dataclass(frozen=True, slots=True)
class Node:
    """A call in a workflow."""

    id: str  # within its workflow; as in schedule logs
    part: str  # weights that it needs; "": none
    kind: NodeKind
    inputs: tuple[str, ...]  # names of artifacts
    outputs: tuple[Artifact, ...]
    degrees: Degrees = Degrees.ONE
    op: str = ""  # what it calls, as profiles and workers name it; "": its id
    model: str = ""  # whose weights; "": those of the request's model
    scale: float = 1.0  # of what it makes, to the request's shape

    @property
    def calls(self) -> str:
        """What it calls, as profiles and workers name it."""
        return self.op or self.id


class WorkflowFault(NamedTuple):
    """What is wrong with a workflow, and where."""

    path: str  # as in "nodes[2].inputs[0]"
    problem: str


class WorkflowFaults(ValueError):
    """A workflow that cannot be run; `faults` are all that were found, in the order of paths."""

    def __init__(self, name: str, faults: Sequence[WorkflowFault]) -> None:
        told = "; ".join(f"{f.path}: {f.problem}" for f in faults)
        super().__init__(f"workflow {name!r}: {told}")
        self.name = name
        self.faults = tuple(faults)


class Redo(NamedTuple):
    """What a request has to run once some artifacts are lost. Nodes in neither tuple are done."""

    ready: tuple[str, ...]  # all their inputs survive
    blocked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Workflow:
    """Nodes and the artifacts between them. Raises WorkflowFaults, with every fault at once.

    One to eight nodes are stepped (such a node has a part, and makes nothing but latents), and
    exactly one is last: no other takes what it makes, and its end ends the request.
    """

    name: str
    nodes: tuple[Node, ...]
    # Its artifacts have no names outside: the latents stand for all of them.
    plain: bool = False
    at: int = 0  # seen from this pass, from 0
    # Ids: makers before takers, else as declared.
    order: tuple[str, ...] = field(init=False, compare=False, repr=False)
    # Ready when a request arrives.
    first: tuple[str, ...] = field(init=False, compare=False, repr=False)
    # Called once before and after the stepped node, in order; after: in the last pass alone.
    before: tuple[str, ...] = field(init=False, compare=False, repr=False)
    # Those before it, and before the stepped nodes of earlier passes: what is lost is made again.
    upstream: tuple[str, ...] = field(init=False, compare=False, repr=False)
    stepped: str = field(init=False, compare=False, repr=False)
    after: tuple[str, ...] = field(init=False, compare=False, repr=False)
    # All that is left to do behind the stepped node, later stepped nodes among them.
    behind: tuple[str, ...] = field(init=False, compare=False, repr=False)
    # Its end ends the request.
    last: str = field(init=False, compare=False, repr=False)
    # The stepped nodes, by pass.
    steppeds: tuple[str, ...] = field(init=False, compare=False, repr=False)
    node: Mapping[str, Node] = field(init=False, compare=False, repr=False)
    section: Mapping[str, Section] = field(init=False, compare=False, repr=False)
    # Position in `order`.
    rank: Mapping[str, int] = field(init=False, compare=False, repr=False)
    # Of each artifact.
    maker: Mapping[str, str] = field(init=False, compare=False, repr=False)
    # Of a node's inputs.
    makers: Mapping[str, tuple[str, ...]] = field(init=False, compare=False, repr=False)
    # Who takes some of a node's outputs.
    followers: Mapping[str, tuple[str, ...]] = field(init=False, compare=False, repr=False)
    # The stepped node, and who takes its latents.
    on_latents: frozenset[str] = field(init=False, compare=False, repr=False)
    # At their end, workers have the latents, or all that these begin from.
    leave_latents: frozenset[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if faults := _faults(self.nodes, self.plain):
            raise WorkflowFaults(self.name, faults)
        maker = {a.name: n.id for n in self.nodes for a in n.outputs}
        makers = {n.id: _unique(maker[i] for i in n.inputs) for n in self.nodes}
        order = _order(makers)
        followers = {id_: tuple(n for n in order if id_ in makers[n]) for id_ in order}
        kinds = {n.id: n.kind for n in self.nodes}
        steppeds = tuple(n for n in order if kinds[n] is NodeKind.STEPPED)
        stepped = steppeds[self.at]
        section = _sections(steppeds, self.at, order, makers)
        earlier = {n for s in steppeds[: self.at] for n in (s, *_ancestors(s, makers))}
        ending = self.at == len(steppeds) - 1
        behind = tuple(n for n in order if section[n] is Section.AFTER)
        left = (*makers[stepped], *followers[stepped]) if self.plain else ()
        for name, value in {
            "order": order,
            "first": tuple(n for n in order if not makers[n]),
            "before": tuple(n for n in order if section[n] is Section.BEFORE and n not in earlier),
            "upstream": tuple(
                n for n in order if section[n] is Section.BEFORE and n not in steppeds
            ),
            "stepped": stepped,
            "after": behind if ending else (),
            "behind": behind,
            "last": next(n for n in order if not followers[n]),
            "steppeds": steppeds,
            "node": {n.id: n for n in self.nodes},
            "section": section,
            "rank": {n: i for i, n in enumerate(order)},
            "maker": maker,
            "makers": makers,
            "followers": followers,
            "on_latents": frozenset((stepped, *followers[stepped])),
            "leave_latents": frozenset((stepped, *left)),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def passes(self) -> tuple[Workflow, ...]:
        """It, seen from each of its passes."""
        return tuple([replace(self, at=at) for at in range(len(self.steppeds))])

    @property
    def ending(self) -> bool:
        """No pass comes behind this one."""
        return self.at == len(self.steppeds) - 1

    def released(self, ended: str, done: Container[str]) -> tuple[str, ...]:
        """Nodes that the end of a node makes ready, in order; `done` holds all done, with it."""
        return tuple(
            [n for n in self.followers[ended] if all(maker in done for maker in self.makers[n])]
        )

    def redo(
        self,
        survive: Container[str],
        begun: Container[str] = (),
        coming: Container[str] = (),
    ) -> Redo:
        """What is left to run where, of all artifacts, those named have a living copy.

        From the last node back: a node has to run if it is the last or if something that has to run
        lacks an artifact of it. Of a stepped node's latents only complete ones survive as an input
        of others. Those `begun` need no inputs: they have a copy of their own latents, or run now;
        `coming` is what makers that run now will make.
        """
        due = {self.last}
        blocked: set[str] = set()
        for node in reversed(self.order):
            if node in due and node not in begun:
                lost = [i for i in self.node[node].inputs if i not in survive]
                due.update(self.maker[i] for i in lost if i not in coming)
                blocked.update((node,) if lost else ())
        return Redo(
            tuple(n for n in self.order if n in due and n not in blocked),
            tuple(n for n in self.order if n in blocked),
        )

    def longest_us(self, nodes: Sequence[str], call_us: Callable[[str], int]) -> int:
        """The critical path through some nodes, in order: parallel ones run beside each other."""
        if len(nodes) == 1:
            return call_us(nodes[0])
        ends_us: dict[str, int] = {}
        for node in nodes:
            begin_us = max((ends_us.get(maker, 0) for maker in self.makers[node]), default=0)
            ends_us[node] = begin_us + call_us(node)
        return max(ends_us.values(), default=0)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _order(makers: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Makers before takers; of those that may be next, the first declared. Cycles are left out."""
    order: list[str] = []
    while True:
        open_ = (n for n in makers if n not in order and all(m in order for m in makers[n]))
        following = next(open_, None)
        if following is None:
            return tuple(order)
        order.append(following)


def _ancestors(node: str, makers: Mapping[str, tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    ahead = list(makers[node])
    while ahead:
        one = ahead.pop()
        if one not in found:
            found.add(one)
            ahead.extend(makers[one])
    return found


def _sections(
    steppeds: Sequence[str], at: int, order: Sequence[str], makers: Mapping[str, tuple[str, ...]]
) -> dict[str, Section]:
    """Where each node stands, seen from one pass."""
    over = {n for s in steppeds[: at + 1] for n in (s, *_ancestors(s, makers))}
    section = {n: Section.BEFORE if n in over else Section.AFTER for n in order}
    section[steppeds[at]] = Section.STEPPED
    return section


def _faults(nodes: Sequence[Node], plain: bool) -> list[WorkflowFault]:
    found: list[WorkflowFault] = []
    index: dict[str, int] = {}
    made_at: dict[str, str] = {}
    maker: dict[str, str] = {}
    for i, node in enumerate(nodes):
        if node.id in index:
            found.append(
                WorkflowFault(f"nodes[{i}].id", f"nodes[{index[node.id]}] is {node.id!r}, too")
            )
        index.setdefault(node.id, i)
        for k, artifact in enumerate(node.outputs):
            at = f"nodes[{i}].outputs[{k}]"
            if artifact.name in made_at:
                problem = f"{made_at[artifact.name]} makes {artifact.name!r}, too"
                found.append(WorkflowFault(at, problem))
            made_at.setdefault(artifact.name, at)
            maker.setdefault(artifact.name, node.id)
        found += _faults_of_kind(f"nodes[{i}]", node)
    for i, node in enumerate(nodes):
        found += [
            WorkflowFault(f"nodes[{i}].inputs[{k}]", f"no node makes {name!r}")
            for k, name in enumerate(node.inputs)
            if name not in maker
        ]
    stepped = [i for i, n in enumerate(nodes) if n.kind is NodeKind.STEPPED]
    if not stepped:
        found.append(WorkflowFault("nodes", "none is stepped"))
    found += [
        WorkflowFault(f"nodes[{i}].kind", f"more than {STEPPED_MAX} are stepped")
        for i in stepped[STEPPED_MAX:]
    ]
    makers: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        known = makers.get(node.id, ())
        makers[node.id] = _unique((*known, *(maker[i] for i in node.inputs if i in maker)))
    if plain and (len(stepped) != 1 or any(len(of_one) > 1 for of_one in makers.values())):
        found.append(WorkflowFault("nodes", "a plain one is a chain with one stepped node"))
    return sorted([*found, *_faults_of_shape(index, makers)], key=_position)


def _faults_of_kind(at: str, node: Node) -> Iterator[WorkflowFault]:
    if node.kind is NodeKind.ONCE:
        if node.degrees is not Degrees.ONE:
            yield WorkflowFault(f"{at}.degrees", "a node that is called once runs on one worker")
        return
    if not node.part:
        yield WorkflowFault(f"{at}.part", "a stepped node needs one")
    if [a.type for a in node.outputs] != [ArtifactType.LATENTS]:
        yield WorkflowFault(f"{at}.outputs", "a stepped node makes latents, and nothing else")


def _faults_of_shape(
    index: Mapping[str, int], makers: Mapping[str, tuple[str, ...]]
) -> Iterator[WorkflowFault]:
    """A cycle, or else more than one end."""
    rest = {n: makers[n] for n in makers if n not in _order(makers)}
    if rest:
        walk = [next(iter(rest))]
        while walk[-1] not in walk[:-1]:
            walk.append(next(m for m in rest[walk[-1]] if m in rest))
        cycle = walk[walk.index(walk[-1]) :][::-1]  # against the walk: makers first
        yield WorkflowFault(f"nodes[{index[cycle[0]]}].inputs", "a cycle: " + " -> ".join(cycle))
        return
    taken = {m for of_one in makers.values() for m in of_one}
    ends = [n for n in makers if n not in taken]
    for end in ends if len(ends) > 1 else ():
        yield WorkflowFault(
            f"nodes[{index[end]}].outputs", "one of several ends: no node takes them"
        )


def _position(fault: WorkflowFault) -> tuple[int, str]:
    number = fault.path.removeprefix("nodes[").partition("]")[0]
    return (int(number) if number.isdecimal() else -1, fault.path)


CHAIN = Workflow(
    "chain",
    (
        Node(TEXT, TEXT, NodeKind.ONCE, (), (Artifact("embeddings", ArtifactType.EMBEDDINGS),)),
        Node(
            DIT,
            DIT,
            NodeKind.STEPPED,
            ("embeddings",),
            (Artifact("latents", ArtifactType.LATENTS),),
            Degrees.OFFERED,
        ),
        Node(VAE, VAE, NodeKind.ONCE, ("latents",), (Artifact("media", ArtifactType.MEDIA),)),
    ),
    plain=True,
)
"""Encode the prompt, denoise, decode: what every request is, unless it names another."""
