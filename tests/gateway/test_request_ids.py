"""Request ids sort by time, never collide, and hold nothing but safe characters."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.request_ids import request_id

MS = 1_000_000


@given(st.integers(0, 2**47), st.integers(1, 2**40), st.integers(0, 2**80 - 1))
def test_later_sorts_behind_earlier(at_ms: int, later_ms: int, bits: int) -> None:
    early = request_id(at_ms * MS, 2**80 - 1)
    late = request_id((at_ms + later_ms) * MS, bits)
    assert early < late
    assert re.fullmatch(r"[0-9a-hjkmnp-tv-z]{26}", early)


@given(st.integers(0, 2**80 - 1), st.integers(0, 2**80 - 1))
def test_the_random_part_is_kept_whole(one: int, other: int) -> None:
    assert (request_id(5 * MS, one) == request_id(5 * MS, other)) == (one == other)
