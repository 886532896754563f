"""Plain chains on workers of which each holds the weights of some nodes alone."""

from __future__ import annotations

import pytest

from control.scheduler.policies import registry
from control.scheduler.values import Outcome

from .desk import BASE, MS, OTHER, Desk
from .fleet import Fleet

APART = (("text",), ("dit",), ("dit",), ("vae", "encode_image"))
PAIRED = (("text", "vae", "encode_image"), ("dit",), ("dit",))
EVERYTHING = ("text", "dit", "vae", "encode_image")
UNEVEN = (EVERYTHING, ("dit",), ("dit",), ("text",))


def loaded(policy: str, offers: tuple[tuple[str, ...], ...], memory: int = 0) -> Fleet:
    fleet = Fleet(policy, workers=len(offers), offers=offers, memory=memory)
    for i in range(4):
        slo_us = 10**9 if i % 2 else 4_000 * MS
        model = OTHER if i == 3 else BASE
        fleet.arrive(f"p{i}", model=model, steps=3, slo_us=slo_us, plan=False)
    fleet.plan()
    return fleet


@pytest.mark.parametrize("policy", registry.names())
@pytest.mark.parametrize("offers", [APART, PAIRED, UNEVEN], ids=["apart", "paired", "uneven"])
def test_every_policy_sends_a_call_to_who_has_its_weights(
    policy: str, offers: tuple[tuple[str, ...], ...]
) -> None:
    for memory in (0, 200):
        fleet = loaded(policy, offers, memory)
        Desk.run(fleet)
        assert {e.outcome for e in fleet.ended.values()} == {Outcome.DONE}, memory
        assert len(fleet.ended) == 4
        for a in fleet.log:
            assert all(a.node in offers[int(w[1:])] for w in a.workers), (a.node, a.workers)
        for load in fleet.loads:
            assert load.node in offers[int(load.worker[1:])], load
