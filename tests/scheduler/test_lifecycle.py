"""The lifecycle tables: complete, and enforced."""

import pytest

from control.scheduler.books.lifecycle import (
    JOB_MOVES,
    WORKER_MOVES,
    IllegalMove,
    JobState,
    WorkerState,
    moved,
)


@pytest.mark.parametrize(("table", "states"), [(JOB_MOVES, JobState), (WORKER_MOVES, WorkerState)])
def test_every_state_has_a_row(table, states):
    assert set(table) == set(states)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("target", JobState)
def test_a_move_is_taken_or_raises(state, target):
    if target is state or target in JOB_MOVES[state]:
        assert moved("job", state, target, JOB_MOVES) is target
    else:
        with pytest.raises(IllegalMove) as error:
            moved("job r1/dit", state, target, JOB_MOVES)
        assert error.value.state is state and error.value.target is target
        assert "r1/dit" in str(error.value)


def test_dropped_is_final():
    assert not JOB_MOVES[JobState.DROPPED]
