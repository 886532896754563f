"""GENSERVE's videos: candidates anchored to concrete workers, and the knapsack over them.

    video ──▶ hold | continue | up | down | resume or start    each: workers, (recoverable, score)
          ──▶ dp[b]: best selection that uses exactly b workers, none of them twice

arXiv 2604.04335v1, section 4.4 and Algorithm 1. As each state remembers one set of workers, this is
a beam of one per (video, b), and the order of videos matters: first those that stand on workers,
then those that wait, each by deadline. Sets of workers are bit masks over the scene's seats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..values import Request


@dataclass(frozen=True, slots=True)
class Video:
    """One video that denoises: under way, at a step boundary, paused, or not begun."""

    request: Request
    ready: bool  # can be given steps now
    from_us: int  # when it can go on
    deadline_us: int | None  # of its last step
    steps_left: int
    step_us: Mapping[int, int]  # by degree, ascending
    able: int  # workers that have its model
    own: int  # workers it stands on: it runs there, or just ended steps there
    leader: int  # worker that keeps its state (0: none yet)

    @property
    def degree(self) -> int:
        return self.own.bit_count()

    def laxity_us(self, degree: int) -> int:
        """D - F; what knows no deadline is as lax as can be."""
        if self.deadline_us is None:
            return 10**12
        return self.deadline_us - self.from_us - self.steps_left * self.step_us[degree]

    def lax_us(self) -> int:
        """At its present degree; at its fastest while it has none."""
        if self.degree in self.step_us:
            return self.laxity_us(self.degree)
        return max(self.laxity_us(k) for k in self.step_us)


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate of a video."""

    kind: str  # "hold", "continue", "up", "down", "resume"
    width: int
    fixed: int  # workers it is tied to
    value: tuple[int, float]  # recoverable, score


@dataclass(frozen=True, slots=True)
class State:
    """A partial selection."""

    value: tuple[int, float]
    used: int
    before: State | None = None
    video: int = -1
    option: Option | None = None
    mask: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers that may be taken, in the order in which they are."""

    bits: tuple[int, ...]

    def take(self, option: Option, video: Video, used: int) -> int | None:
        """The option's workers beside those used; None: they are not there."""
        if option.fixed & used:
            return None
        mask, missing = option.fixed, option.width - option.fixed.bit_count()
        if missing and video.leader in self.bits and not video.leader & (used | mask):
            mask, missing = mask | video.leader, missing - 1
        for bit in self.bits:
            if missing == 0:
                break
            if bit & video.able and not bit & (used | mask):
                mask |= bit
                missing -= 1
        return None if missing else mask


def options(video: Video, may_pause: bool, may_resume: bool, credit: bool) -> list[Option]:
    """A video's candidates; a hold has no value but, by `credit`, that of surviving it."""
    fastest = min(video.step_us, key=lambda k: (video.step_us[k], k))
    held = (int(credit and video.laxity_us(fastest) >= video.step_us[fastest]), 0.0)
    hold = Option("hold", 0, 0, held)
    if not video.own:
        found = [hold]
        if may_resume:
            for k in video.step_us:
                if all(video.step_us[k] < video.step_us[n] for n in video.step_us if n < k):
                    found.append(Option("resume", k, 0, _score(video, k)))
        return found
    found = [Option("continue", video.degree, video.own, _score(video, video.degree))]
    wider = [k for k in video.step_us if k > video.degree]
    faster = [k for k in wider if video.step_us[k] < video.step_us[video.degree]]
    if faster and video.ready:
        found.append(Option("up", faster[0], video.own, _score(video, faster[0])))
    narrower = [k for k in video.step_us if k < video.degree]
    if narrower:
        kept = _first_bits(video.own, video.leader, narrower[-1])
        found.append(Option("down", narrower[-1], kept, _score(video, narrower[-1])))
    return [*found, hold] if may_pause else found


def select(
    videos: Sequence[Video], choices: Sequence[Sequence[Option]], pool: Pool, workers: int
) -> list[State | None]:
    """dp after the last video, by the number of workers used."""
    dp: list[State | None] = [State((0, 0.0), 0), *[None] * workers]
    for i, (video, some) in enumerate(zip(videos, choices, strict=True)):
        following: list[State | None] = [None] * (workers + 1)
        for b, state in enumerate(dp):
            if state is None:
                continue
            for option in some:
                if b + option.width > workers:
                    continue
                mask = pool.take(option, video, state.used)
                if mask is None:
                    continue
                count = state.value[0] + option.value[0]
                value = (count, state.value[1] + option.value[1])
                known = following[b + option.width]
                if known is None or value > known.value:
                    following[b + option.width] = State(
                        value, state.used | mask, state, i, option, mask
                    )
        dp = following
    return dp


def picked(state: State | None) -> dict[int, tuple[Option, int]]:
    """By video: its option and workers."""
    found: dict[int, tuple[Option, int]] = {}
    while state is not None and state.option is not None:
        found[state.video] = (state.option, state.mask)
        state = state.before
    return found


def bits(mask: int) -> list[int]:
    """The single bits of a mask, lowest first."""
    found: list[int] = []
    while mask:
        low = mask & -mask
        found.append(low)
        mask ^= low
    return found


def _score(video: Video, degree: int) -> tuple[int, float]:
    lax_us = video.laxity_us(degree)
    return (int(lax_us >= 0), 1 / (1 + abs(lax_us) / 1e6))


def _first_bits(mask: int, leader: int, count: int) -> int:
    """That many of its workers, the leader among them."""
    kept = mask & leader
    for bit in bits(mask ^ kept):
        if kept.bit_count() < count:
            kept |= bit
    return kept
