"""The lifecycle of requests: complete, enforced, and drawn in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.requests.lifecycle import (
    ENDED,
    OPEN,
    REQUEST_MOVES,
    LifecycleState,
    advanced,
    diagram,
    told,
)
from control.scheduler.books.lifecycle import IllegalMove

ADR = Path(__file__).parents[2] / "docs/adr/0013-operations-belong-to-control.md"


def test_every_state_has_a_row_and_a_way_to_it() -> None:
    assert set(REQUEST_MOVES) == set(LifecycleState)
    reached = {target for targets in REQUEST_MOVES.values() for target in targets}
    assert reached == set(LifecycleState) - {LifecycleState.RECEIVED}


@pytest.mark.parametrize("state", LifecycleState)
@pytest.mark.parametrize("target", LifecycleState)
def test_a_move_is_taken_or_raises(state: LifecycleState, target: LifecycleState) -> None:
    if target is state or target in REQUEST_MOVES[state]:
        assert advanced("r", state, target) is target
    else:
        with pytest.raises(IllegalMove) as error:
            advanced("r", state, target)
        assert "request r" in str(error.value)


def test_what_has_ended_stays_ended() -> None:
    assert all(not REQUEST_MOVES[state] for state in ENDED)
    assert not OPEN & ENDED


def test_clients_have_a_word_for_what_they_can_see() -> None:
    assert {state for state in LifecycleState if told(state)} == OPEN | ENDED


def test_the_documentation_shows_the_table() -> None:
    assert diagram() in ADR.read_text()
