"""When a process that died is started again, and when that is given up.

died -> wait first_s -> started; died again within calm_s -> twice as long, up to most_s
a life of calm_s or longer: the next wait is first_s again
more than `most` starts within window_s: given up
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class RestartRule:
    """Times in seconds."""

    first_s: float = 0.5
    longest_s: float = 15.0
    calm_s: float = 60.0
    most: int = 10
    window_s: float = 600.0


DEFAULT = RestartRule()


class Restarts:
    """The starts of one process."""

    def __init__(self, rule: RestartRule) -> None:
        self._rule = rule
        self._wait_s = rule.first_s
        self._recent: deque[float] = deque()
        self.count = 0  # all of them, the first start aside

    def died(self, now_s: float, lived_s: float) -> float | None:
        """Seconds until the process is to be started again; None when that is given up.

        `now_s` is any clock that does not go back.
        """
        rule = self._rule
        while self._recent and self._recent[0] <= now_s - rule.window_s:
            self._recent.popleft()
        if len(self._recent) >= rule.most:
            return None
        self._recent.append(now_s)
        self.count += 1
        wait_s = rule.first_s if lived_s >= rule.calm_s else self._wait_s
        self._wait_s = min(rule.longest_s, 2 * wait_s)
        return wait_s
