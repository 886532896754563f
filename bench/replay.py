"""Replays a live journal: the recorded facts must lead to the recorded plans.

Reads the journal of one term from the broker (or from a file that `--save` wrote), builds the
scheduler from the settings and profile that the leader recorded, shows it every fact in the
recorded order and asks for a plan wherever the leader did. Digests that differ mean that the
scheduler's code has changed its mind, or that a fact got lost. The replay also yields the schedule
log.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from google.protobuf import proto

from control.journal import joined, read
from control.scheduler.core import Scheduler
from control.scheduler.schedule_log import ScheduleLog
from control.scheduler.settings import Settings
from control.scheduler.times.cells import LatencySnapshot
from control.scheduler.times.profile import Profile
from control.scheduler.values import Arrived, Event
from control.scheduler.workflow import Workflow
from control.workflows.compiled import compiled
from hocket.messaging.bus import Bus, Subjects
from hocket.security.identity import Identity, broker_access
from hocket.v1.journal_pb2 import JournalEntry


@dataclass
class JournalIncomplete(Exception):
    """The journal does not hold a whole term from its start."""

    term: int
    missing: str

    def __str__(self) -> str:
        return f"journal of term {self.term}: {self.missing}"


@dataclass
class Replay:
    """What a replay found."""

    term: int
    facts: int = 0
    plans: int = 0
    differing: list[int] = field(default_factory=list)  # numbers of plans with another digest
    log: ScheduleLog | None = None

    @property
    def agrees(self) -> bool:
        return self.plans > 0 and not self.differing


def replay(entries: Iterable[JournalEntry], term: int | None = None) -> Replay:
    """Replays one term (the newest, if none is named). Raises JournalIncomplete."""
    entries = list(entries)
    wanted = term if term is not None else max((e.term for e in entries), default=0)
    mine = sorted((e for e in entries if e.term == wanted), key=lambda e: e.sequence)
    started = joined(e.leader_started for e in mine if e.HasField("leader_started"))
    if started is None:
        raise JournalIncomplete(wanted, "no record of the leader's settings")
    gaps = [b.sequence for a, b in itertools.pairwise(mine) if b.sequence != a.sequence + 1]
    if gaps:
        raise JournalIncomplete(wanted, f"entries are missing before number {gaps[0]}")
    found = Replay(wanted)
    scheduler = Scheduler(
        msgspec.json.decode(started.settings_json, type=Settings),
        Profile.from_csv(started.profile_csv),
    )
    if started.latencies_json:
        learned = msgspec.json.decode(started.latencies_json, type=LatencySnapshot)
        scheduler.restore_latencies(learned)
    decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
    workflows: dict[str, Workflow] = {}
    for entry in mine:
        if entry.HasField("observed_json"):
            fact = decoder.decode(entry.observed_json)
            if entry.HasField("workflow"):
                known = compiled(entry.workflow).workflow
                workflows[known.name] = known
            if isinstance(fact, Arrived) and fact.request.workflow in workflows:
                scheduler.learn(workflows[fact.request.workflow])
            _observe(found, scheduler, fact)
        elif entry.HasField("plan"):
            plan = scheduler.plan(entry.plan.now_us)
            if plan.digest != entry.plan.digest:
                found.differing.append(found.plans)
            found.plans += 1
            if found.log is not None:
                found.log.planned(plan)
                for end in plan.ended:
                    found.log.ended(end)
    return found


def _observe(found: Replay, scheduler: Scheduler, fact: Event) -> None:
    if found.log is None:
        found.log = ScheduleLog(fact.at_us)
    if isinstance(fact, Arrived) and not found.log.arrivals:
        found.log.start_us = fact.at_us
    found.log.observed(fact, scheduler.observe(fact))
    found.facts += 1


async def entries_from_broker(
    url: str, cluster: str, tls_dir: Path | None = None
) -> list[JournalEntry]:
    """All entries of a cluster's journal. `tls_dir`: an operator's certificates, where in use."""
    access = broker_access(Identity.load(tls_dir), "operator")
    bus = await Bus.connect(url, "replay", access=access)
    try:
        return [stored.entry async for stored in read(bus, Subjects(cluster))]
    finally:
        await bus.close()


def save(entries: Iterable[JournalEntry], path: Path) -> None:
    """Writes entries as length-delimited protobuf."""
    out = io.BytesIO()
    for entry in entries:
        proto.serialize_length_prefixed(entry, out)
    path.write_bytes(out.getvalue())


def load(path: Path) -> list[JournalEntry]:
    """Reads what `save` wrote."""
    found: list[JournalEntry] = []
    stored = io.BytesIO(path.read_bytes())
    while (entry := proto.parse_length_prefixed(JournalEntry, stored)) is not None:
        found.append(entry)
    return found
