"""The workflow value: what it answers of a graph, and which graphs it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from control.scheduler.values import DIT, TEXT, VAE
from control.scheduler.workflow import (
    CHAIN,
    Artifact,
    ArtifactType,
    Degrees,
    Node,
    NodeKind,
    Redo,
    Section,
    Workflow,
    WorkflowFaults,
)


def once(id_: str, inputs: tuple[str, ...], output: str, part: str | None = None) -> Node:
    made = (Artifact(output, ArtifactType.EMBEDDINGS),)
    return Node(id_, id_ if part is None else part, NodeKind.ONCE, inputs, made)


def stepped(id_: str, inputs: tuple[str, ...], output: str = "latents") -> Node:
    made = (Artifact(output, ArtifactType.LATENTS),)
    return Node(id_, id_, NodeKind.STEPPED, inputs, made, Degrees.OFFERED)


# clip ──▶ dit ──▶ vae ──▶ media; the second encoder's prompt goes through a node of its own
WIDE = Workflow(
    "wide",
    (
        once("media", ("pixels",), "files", part=""),
        once("vae", ("latents",), "pixels"),
        stepped("dit", ("clip-out", "t5-out")),
        once("t5", ("tokens",), "t5-out"),
        once("tokenizer", (), "tokens"),
        once("clip", (), "clip-out"),
    ),
)


def test_the_chain() -> None:
    assert CHAIN.order == (TEXT, DIT, VAE)
    assert (CHAIN.first, CHAIN.before, CHAIN.after) == ((TEXT,), (TEXT,), (VAE,))
    assert (CHAIN.stepped, CHAIN.last) == (DIT, VAE)
    assert CHAIN.section == {TEXT: Section.BEFORE, DIT: Section.STEPPED, VAE: Section.AFTER}
    assert CHAIN.on_latents == {DIT, VAE} and CHAIN.leave_latents == {TEXT, DIT, VAE}
    assert CHAIN.released(TEXT, {TEXT}) == (DIT,)
    assert CHAIN.released(DIT, {TEXT, DIT}) == (VAE,)
    assert CHAIN.released(VAE, {TEXT, DIT, VAE}) == ()


def test_the_order_is_the_makers_then_the_declared_one() -> None:
    assert WIDE.order == ("tokenizer", "t5", "clip", "dit", "vae", "media")
    assert WIDE.first == ("tokenizer", "clip")
    assert WIDE.before == ("tokenizer", "t5", "clip")
    assert WIDE.after == ("vae", "media")
    assert WIDE.last == "media"
    assert WIDE.makers["dit"] == ("clip", "t5")


def test_a_node_is_released_by_the_last_of_its_makers() -> None:
    assert WIDE.released("clip", {"clip"}) == ()
    assert WIDE.released("tokenizer", {"clip", "tokenizer"}) == ("t5",)
    assert WIDE.released("t5", {"clip", "tokenizer", "t5"}) == ("dit",)


@pytest.mark.parametrize(
    ("survive", "ready", "blocked"),
    [
        ((), (TEXT,), (DIT, VAE)),
        (("embeddings",), (DIT,), (VAE,)),
        (("embeddings", "latents"), (VAE,), ()),
        (("latents",), (VAE,), ()),
    ],
)
def test_redo_of_the_chain(
    survive: tuple[str, ...], ready: tuple[str, ...], blocked: tuple[str, ...]
) -> None:
    assert CHAIN.redo(survive) == Redo(ready, blocked)


@pytest.mark.parametrize(
    ("survive", "ready", "blocked"),
    [
        (("clip-out",), ("tokenizer",), ("t5", "dit", "vae", "media")),
        (("clip-out", "tokens"), ("t5",), ("dit", "vae", "media")),
        (("t5-out",), ("clip",), ("dit", "vae", "media")),
        (("latents",), ("vae",), ("media",)),
        (("pixels",), ("media",), ()),
    ],
)
def test_redo_walks_back_to_the_nearest_nodes_whose_inputs_survive(
    survive: tuple[str, ...], ready: tuple[str, ...], blocked: tuple[str, ...]
) -> None:
    assert WIDE.redo(survive) == Redo(ready, blocked)


# a ──▶ base ──▶ vae ──▶ back ──▶ fine ──▶ last         b: for the second pass alone
#                        b ─────────┘
TWO = Workflow(
    "two",
    (
        once("b", (), "b-out"),
        once("a", (), "a-out"),
        stepped("base", ("a-out",), "rough"),
        once("vae", ("rough",), "small"),
        once("back", ("small",), "again"),
        stepped("fine", ("a-out", "b-out", "again"), "good"),
        once("last", ("good", "small"), "files"),
    ),
)


def test_each_pass_has_what_no_earlier_one_needs_before_it() -> None:
    base, fine = TWO.passes
    assert (base.at, fine.at, base.steppeds) == (0, 1, ("base", "fine"))
    assert (base.before, base.stepped, base.after) == (("a",), "base", ())
    assert base.behind == ("b", "vae", "back", "fine", "last") and not base.ending
    assert (fine.before, fine.stepped) == (("b", "vae", "back"), "fine")
    assert fine.after == fine.behind == ("last",) and fine.ending
    assert fine.section["base"] is Section.BEFORE and base.section["fine"] is Section.AFTER
    assert TWO == base != fine


@pytest.mark.parametrize(
    ("survive", "begun", "coming", "ready", "blocked"),
    [
        ((), (), (), ("b", "a"), ("base", "vae", "back", "fine", "last")),
        (("rough",), (), (), ("b", "a", "vae"), ("back", "fine", "last")),
        (("small",), ("fine",), (), ("fine",), ("last",)),
        (("a-out", "b-out", "small"), ("back",), ("again",), (), ("fine", "last")),
        ((), ("base", "fine"), (), ("base", "fine"), ("vae", "last")),
    ],
)
def test_redo_across_passes(
    survive: tuple[str, ...],
    begun: tuple[str, ...],
    coming: tuple[str, ...],
    ready: tuple[str, ...],
    blocked: tuple[str, ...],
) -> None:
    assert TWO.redo(survive, begun, coming) == Redo(ready, blocked)


def test_the_critical_path_takes_parallel_nodes_once() -> None:
    times_us = {"tokenizer": 1, "t5": 20, "clip": 15, "vae": 4, "media": 3}
    assert WIDE.longest_us(WIDE.before, times_us.__getitem__) == 21
    assert WIDE.longest_us(WIDE.after, times_us.__getitem__) == 7
    assert WIDE.longest_us((), times_us.__getitem__) == 0


def faults(*nodes: Node) -> dict[str, str]:
    with pytest.raises(WorkflowFaults) as raised:
        Workflow("planted", nodes)
    assert all(f.path in str(raised.value) for f in raised.value.faults)
    return {f.path: f.problem for f in raised.value.faults}


def test_every_fault_is_told_at_once_each_with_its_path() -> None:
    told = faults(
        once("a", ("b-out",), "a-out"),
        once("b", ("a-out", "nowhere"), "b-out"),
        once("a", (), "b-out"),
        dataclasses.replace(stepped("dit", ("a-out",)), part="", outputs=()),
        stepped("second", ("a-out",), "more"),
        dataclasses.replace(once("wide", (), "w"), degrees=Degrees.OFFERED),
    )
    assert told == {
        "nodes[0].inputs": "a cycle: a -> b -> a",
        "nodes[1].inputs[1]": "no node makes 'nowhere'",
        "nodes[2].id": "nodes[0] is 'a', too",
        "nodes[2].outputs[0]": "nodes[1].outputs[0] makes 'b-out', too",
        "nodes[3].part": "a stepped node needs one",
        "nodes[3].outputs": "a stepped node makes latents, and nothing else",
        "nodes[5].degrees": "a node that is called once runs on one worker",
    }


def test_nine_stepped_nodes_are_too_many_and_a_plain_one_is_a_chain() -> None:
    first = stepped("d0", ())
    many = [first, *(stepped(f"d{i}", (f"l{i - 1}",), f"l{i}") for i in range(2, 10))]
    many.insert(1, stepped("d1", ("latents",), "l1"))
    assert faults(*many) == {
        "nodes[8].kind": "more than 8 are stepped",
        "nodes[9].kind": "more than 8 are stepped",
    }
    with pytest.raises(WorkflowFaults, match="a plain one is a chain"):
        dataclasses.replace(WIDE, plain=True)


def test_a_cycle_is_told_without_what_only_hangs_on_it() -> None:
    told = faults(
        stepped("dit", ("a-out",)),
        once("a", ("b-out",), "a-out"),
        once("b", ("c-out",), "b-out"),
        once("c", ("a-out",), "c-out"),
    )
    assert told == {"nodes[1].inputs": "a cycle: a -> c -> b -> a"}


def test_more_than_one_end_or_no_stepped_node() -> None:
    assert faults() == {"nodes": "none is stepped"}
    told = faults(once("a", (), "a-out"), once("b", ("a-out",), "x"), stepped("dit", ("a-out",)))
    several = "one of several ends: no node takes them"
    assert told == {"nodes[1].outputs": several, "nodes[2].outputs": several}
