"""Something happens at every await: a crash, a stop, a broken connection, exactly there.

One scripted course (submit and follow to the end; submit and cancel; a change of leaders) is run
over and over; in the k-th run the process that runs a chosen coroutine is killed (or stopped, or
the call is broken off) at the k-th place where that coroutine has to wait. What must hold then is
what must hold always.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from .faults import Fault
from .loop import SimulatedProcess, Tell
from .scenario import BEGIN_US, Script, SeedResult, perform
from .stories import Story, wish_of
from .world import World

SECOND_US = 1_000_000
_AWAY_S = 1.0  # a process that was stopped goes on then
COURSES = ("follow", "cancel", "takeover")
DEEDS = ("kill", "stop", "break")


@dataclass(frozen=True)
class AwaitSite:
    """A coroutine in a kind of process."""

    process: str  # how its name begins
    coroutine: str  # its qualified name; a "." at the end: any method of the class

    def __str__(self) -> str:
        return f"{self.process}: {self.coroutine}"


# Whatever takes part in a request's life. A call is served by `ServerCall._serve`.
SITES = (
    AwaitSite("gateway", "ServerCall._serve"),
    AwaitSite("gateway", "Line."),
    AwaitSite("control", "ServerCall._serve"),
    AwaitSite("control", "AdmissionControl."),
    AwaitSite("control", "Endings."),
    AwaitSite("control", "Attachments."),
    AwaitSite("control", "Driver.run"),
    AwaitSite("control", "Replica."),
    AwaitSite("control", "Leadership."),
    AwaitSite("w", "Agent."),
)


def courses(
    sites: tuple[AwaitSite, ...] = SITES,
    deeds: tuple[str, ...] = DEEDS,
    every: int = 1,
    most: int = 1_000_000,
) -> Iterator[tuple[str, SeedResult]]:
    """All of it, or of the awaits each `every`-th, at most so many; each run with what it was."""
    for course in COURSES:
        for site in sites:
            for deed in deeds:
                if deed == "break" and "_serve" not in site.coroutine:
                    continue
                yield from _all_awaits(course, site, deed, every, most)


def _all_awaits(
    course: str, site: AwaitSite, deed: str, every: int, most: int
) -> Iterator[tuple[str, SeedResult]]:
    for number in range(0, every * most, every):
        trap = Trap(site, deed, number)
        result = perform(number, _script(course, trap))
        if not trap.sprung:
            return
        yield f"{course}, {deed} at await {number} of {site}", result


class Trap:
    """Waits for an await, and does its deed there once."""

    def __init__(self, site: AwaitSite, deed: str, number: int) -> None:
        self._site, self._deed, self._left = site, deed, number
        self._world: World | None = None
        self._counts = False
        self.sprung = False

    def prepare(self, world: World) -> None:
        """Sees every coroutine that is started from now on."""
        self._world = world
        world.loop.watched = self._watch

    def set(self, world: World) -> None:
        """From now on it counts."""
        self._counts = True

    def _watch(self, process: SimulatedProcess, work: Coroutine[Any, Any, Any]) -> Tell | None:
        site = self._site
        name = getattr(work, "__qualname__", "")
        whole = name == site.coroutine or (
            site.coroutine.endswith(".") and name.startswith(site.coroutine)
        )
        if not process.name.startswith(site.process) or not whole:
            return None
        owner = getattr(work, "cr_frame", None)
        call = owner.f_locals.get("self") if owner is not None else None
        return lambda: self._waits(process, call)

    def _waits(self, process: SimulatedProcess, call: Any) -> None:
        world = self._world
        if self.sprung or not self._counts or world is None or world.over or process.dead:
            return
        if self._left:
            self._left -= 1
            return
        self.sprung = True
        deeds: dict[str, Callable[[], None]] = {
            "kill": lambda: self._kill(process),
            "stop": lambda: self._stop(process),
            "break": lambda: self._break(call),
        }
        deeds[self._deed]()

    def _kill(self, process: SimulatedProcess) -> None:
        """Nothing of what it says from now on is heard; its tasks end, its supervisor comes."""
        world = self._world
        assert world is not None
        process.cut_off()
        world.outside(process.kill())

    def _stop(self, process: SimulatedProcess) -> None:
        process.stop()
        loop = process.loop
        loop.at_us(loop.now_us + round(_AWAY_S * 1e6), process.resume)

    def _break(self, call: Any) -> None:
        call.channel.break_off()


def _script(course: str, trap: Trap) -> Script:
    behaviours = {"follow": "wait", "cancel": "cancel", "takeover": "wait"}
    stories = []
    for number in range(2):
        wish = wish_of(steps=4, key=f"key-{number}")
        starts_us = BEGIN_US + number * 100_000
        stories.append(Story(f"c{number}", behaviours[course], wish, starts_us, number))
    faults = []
    if course == "takeover":
        for name in ("control-0", "control-1"):
            at_us = BEGIN_US + (150_000 if name == "control-0" else 6 * SECOND_US)
            faults.append(Fault(at_us, "kill", name, SECOND_US))
    return Script(stories, faults, "fixed-1", 2, prepare=trap.prepare, begin=trap.set)
