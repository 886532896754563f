"""`python -m bench.chaos.remote ADDRESS PREFIX`: callers on one of several hosts.

Reads one wish a line on its input, `key side steps seed deadline_s`, and makes them all at once; a
line `under way` is written when all have taken a step, and for each call, at its end, a line of
JSON: key, end, groups of workers that ran it, problem.
"""

from __future__ import annotations

import asyncio
import json
import sys

from bench.chaos.callers import ChaosCallers, Gateway
from bench.chaos.history import History
from bench.chaos.wishes import PATIENT, PICTURES, MediaWish, PlannedCall
from hocket.client import HocketClient
from hocket.clock import steady_ns

_LIMIT_S = 150.0
_PROMPT = "a fox on a green background"


class _Groups(History):
    """Also remembers every group that ran a step."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, set[tuple[str, ...]]] = {}

    def note_groups(self) -> None:
        for observed in self.calls.values():
            if observed.workers:
                self.groups.setdefault(observed.key, set()).add(tuple(sorted(observed.workers)))


def _call(number: int, line: str) -> PlannedCall:
    key, side, steps, seed, deadline_s = line.split()
    wish = MediaWish(key, PICTURES, _PROMPT, int(side), 1, int(steps), int(seed))
    return PlannedCall(number, key, wish, PATIENT, 0.0, 0.0, float(deadline_s))


async def _watch(history: _Groups, count: int) -> None:
    told = False
    while True:
        history.note_groups()
        calls = history.calls.values()
        if not told and sum(bool(history.progress_s[s.key]) for s in calls) == count:
            print("under way", flush=True)
            told = True
        await asyncio.sleep(0.02)


async def _run(address: str, calls: list[PlannedCall]) -> None:
    history = _Groups()
    async with HocketClient(address) as client:
        began_ns = steady_ns()
        doors = [Gateway("gateway", client, client)]
        callers = ChaosCallers(
            doors, history, lambda: (steady_ns() - began_ns) / 1e9, {}, False, _LIMIT_S
        )
        watching = asyncio.ensure_future(_watch(history, len(calls)))
        try:
            await asyncio.gather(*(callers.run(call) for call in calls))
        finally:
            watching.cancel()
    for observed in history.calls.values():
        groups = sorted(history.groups.get(observed.key, ()))
        told = {
            "key": observed.key,
            "ended": observed.ended,
            "groups": groups,
            "problem": observed.problem,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    asyncio.run(_run(sys.argv[1], [_call(n, line) for n, line in enumerate(lines)]))
