"""What is left of a request, in microseconds, for policies that compare or test that.

From mean call times, as the published systems do: no waiting, no moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..settings import SettingError
from ..values import Request
from ..workflow import Section

if TYPE_CHECKING:
    from ..outlook.scene import Scene, Work


def steps_us(scene: Scene, request: Request, degrees: tuple[int, ...]) -> dict[int, int]:
    """One denoising step by degree."""
    known = scene.steps_us(request)
    if degrees == tuple(known):
        return known
    return {k: scene.step_us(request, k) for k in degrees}


def steps_left(work: Work) -> int:
    """Denoising steps that its request still has to run."""
    if work.section is Section.AFTER:
        return 0
    return work.request.steps if work.section is Section.BEFORE else work.steps_left


def remaining_us(scene: Scene, work: Work, degree: int, *, decode: bool = True) -> int:
    """All that its request still has to run, denoising at that degree. Of the calls before its
    steps and behind them: all, as long as one is left.
    """
    request = work.request
    left_us = 0
    if work.section is Section.BEFORE:
        left_us += scene.before_us(request)
    if work.section is not Section.AFTER:
        left_us += steps_left(work) * scene.step_us(request, degree)
    if decode or work.section is Section.AFTER:
        left_us += scene.after_us(request)
    return left_us


def total_us(scene: Scene, request: Request, degree: int) -> int:
    """The whole request, from its arrival on."""
    denoise_us = request.steps * scene.step_us(request, degree)
    return scene.before_us(request) + denoise_us + scene.after_us(request)


def fastest(step_us: Mapping[int, int]) -> int:
    """The degree of the shortest step; the narrowest of equals; 1 of none."""
    return min(step_us, key=lambda k: (step_us[k], k), default=1)


def at_most(degrees: tuple[int, ...], degree: int) -> int:
    """That degree, or the widest offered below it (else the narrowest; 1 while none is offered)."""
    return max((k for k in degrees if k <= degree), default=min(degrees, default=1))


def wanted(scene: Scene, request: Request, degree: int) -> int:
    """A degree setting applied to a request: 0 stands for its fastest."""
    degrees = scene.degrees(request)
    if degree == 0:
        return fastest(steps_us(scene, request, degrees))
    return at_most(degrees, degree)


def read_table(key: str, text: str) -> tuple[tuple[int, int], ...]:
    """`"256=1,1024=2"` as ((256, 1), (1024, 2)), ascending. Raises: SettingError."""
    allowed = "pairs like 256=1,1024=2: pixels of a square's side = degree, both positive"
    pairs: dict[int, int] = {}
    for part in text.split(","):
        side, _, degree = part.partition("=")
        if not (side.strip().isdecimal() and degree.strip().isdecimal()):
            raise SettingError(key, text, allowed)
        pairs[int(side)] = int(degree)
    if not all(side > 0 and degree > 0 for side, degree in pairs.items()):
        raise SettingError(key, text, allowed)
    return tuple(sorted(pairs.items()))


def nearest(table: tuple[tuple[int, int], ...], request: Request) -> int:
    """The degree of the table's nearest size, by the ratio of pixels; the smaller of equals."""
    pixels = request.shape.width * request.shape.height

    def ratio(pair: tuple[int, int]) -> tuple[float, int]:
        known = pair[0] * pair[0]
        return max(pixels / known, known / pixels), pair[0]

    return min(table, key=ratio)[1]
