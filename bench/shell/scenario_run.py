"""What a scenario has left behind when it is over: the checks of invariants.py read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from hocket.v1 import journal_pb2, mesh_pb2

from .callers import SimulatedCallers
from .faults import STRANGE, Fault
from .loop import SimulatedProcess
from .stories import Story
from .world import World


@dataclass(frozen=True)
class JournalEnd:
    """An end as it stands in the journal."""

    at_us: int
    outcome: str


def outcome_of(ended: journal_pb2.EndedRequest | mesh_pb2.RequestEvent) -> str:
    if ended.HasField("finished"):
        return "finished"
    return "failed" if ended.HasField("failed") else "cancelled"


@dataclass
class ScenarioRun:
    """What happened."""

    world: World
    stories: list[Story]
    faults: list[Fault]
    callers: SimulatedCallers
    healed_us: int = 0
    led_us: int | None = None  # somebody leads since then, once all has healed
    accepted: dict[str, list[int]] = field(default_factory=dict)  # when, by request
    incomplete: set[str] = field(default_factory=set)  # accepted without defaults
    ended: dict[str, list[JournalEnd]] = field(default_factory=dict)
    terms: list[int] = field(default_factory=list)  # of what was stored, in order
    # When something was first assigned, by worker, term and sequence.
    assigned_us: dict[tuple[str, int, int], int] = field(default_factory=dict)
    troubles: dict[str, int] = field(default_factory=dict)  # as the leader counted them
    held: list[tuple[str, str, str]] = field(default_factory=list)  # worker, request, artifact
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    @property
    def calm(self) -> bool:
        return not self.faults and self.world.loop.watched is None

    @property
    def undisturbed(self) -> bool:
        """Whether nothing went wrong but that strangers came."""
        return self.world.loop.watched is None and all(f.kind in STRANGE for f in self.faults)

    def ends(self, request: str) -> list[JournalEnd]:
        return self.ended.get(request, [])

    def digest(self) -> str:
        """The same for two runs that told and stored the same at the same times."""
        told = [(story.name, t) for story in self.stories for t in story.told]
        stored = [(m.subject, m.unix_us) for m in self.world.broker.all_messages()]
        return hashlib.sha256(repr((told, stored)).encode()).hexdigest()

    def processes(self) -> list[SimulatedProcess]:
        living = [m.process for m in self.world.members.values() if m.process is not None]
        return [*self.world.past, *living]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Sizes before the first request and after the last."""
        return {name: (self.before.get(name, 0), size) for name, size in self.after.items()}
