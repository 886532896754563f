"""Membership: which workers live, judged by the age of their last heartbeat on control's own clock.

Pure bookkeeping: heartbeats and the time go in, facts for the scheduler come out. Heartbeats carry
no time stamps; two hosts' clocks are never compared.

A name belongs to one process, its incarnation. Of two that live under one name the first keeps it:

    first    ▪   ▪   ▪            its lease ends ▼
    second         ▫   ▫ refused: the first lives   ▫ up

The second is refused once the first has been heard of behind it; where the first was heard of last
before it, it may be the first's successor, and waits for that lease to end. A supervisor that has
started a worker again says so in the heartbeat: that one waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from control.scheduler.values import (
    GroupHeld,
    Held,
    ModelFacts,
    NodeParts,
    NothingHeard,
    PartFacts,
    WorkerLost,
    WorkerUp,
)
from control.workflows.compiled import profile_name
from hocket.v1 import generation_pb2, mesh_pb2, types_pb2
from hocket.workflows.roles import together

_MIB = 1 << 20
_LOAD_CHANGED = 2  # times longer or shorter is worth a fact …
_LOAD_SHORT_US = 20_000  # … but not below this


@dataclass
class Lease:
    """A living worker."""

    heartbeat: mesh_pb2.Heartbeat  # the newest one
    seen_us: int
    told: tuple[PartFacts, ...]  # of its weights, to the scheduler
    suspect: bool = False  # a peer reported trouble with it since its last heartbeat
    excused_us: int = 0  # of the time since its last heartbeat
    rival: str = ""  # another incarnation, heard of while this one's lease lived …
    rival_lives: bool = False  # … and this one was heard of behind it: two processes live


class Leases:
    """All living workers. A lease ends `lease_us` after the last heartbeat, or when the worker says
    goodbye. Time in which control itself was held up counts for nobody: it heard nothing then.
    """

    def __init__(self, lease_us: int, term: int | None = None) -> None:
        """`term`: the leader's, whose sequences heartbeats of that term name; None: not known."""
        self.term = term
        self.refusals = 0  # heartbeats of incarnations that were refused
        self.stale = 0  # heartbeats that came in behind newer ones
        self.look_every_us = lease_us // 10  # so often `look` and `expire` are due
        self._lease_us = lease_us
        self._looked_us: int | None = None
        self._leases: dict[str, Lease] = {}

    @property
    def alive(self) -> Mapping[str, Lease]:
        return self._leases

    def heartbeat(self, beat: mesh_pb2.Heartbeat, now_us: int) -> tuple[WorkerUp | WorkerLost, ...]:
        """Takes one heartbeat; returns what the scheduler has to know of it."""
        known = self._leases.get(beat.worker)
        if known is not None and known.heartbeat.incarnation == beat.incarnation:
            return self._again(known, beat, now_us)
        if beat.leaving:  # of a process whose lease has ended, or that never had one
            if known is not None and known.rival == beat.incarnation:
                known.rival, known.rival_lives = "", False
            return ()
        if known is not None and not _succeeds(beat, known.heartbeat):
            if known.rival != beat.incarnation:
                known.rival, known.rival_lives = beat.incarnation, False
            self.refusals += known.rival_lives
            return ()
        weights = _weights(beat.memory)
        self._leases[beat.worker] = Lease(heartbeat=beat, seen_us=now_us, told=weights)
        return (self._up(beat, now_us),)

    def refused(self, beat: mesh_pb2.Heartbeat) -> str | None:
        """Why this process cannot have the name that it goes by; None: it can, or may yet."""
        known = self._leases.get(beat.worker)
        if known is None or not known.rival_lives or known.rival != beat.incarnation:
            return None
        first = known.heartbeat
        return (
            f"another worker named {beat.worker!r} lives, on host {first.host or 'unknown'!r} "
            f"(incarnation {first.incarnation}): names are unique in a cluster"
        )

    def nothing_heard(self, now_us: int) -> NothingHeard | None:
        """The fact that no worker was heard of for half a lease: messages do not come in."""
        if not self._leases:
            return None
        newest_us = max(lease.seen_us for lease in self._leases.values())
        return NothingHeard(at_us=now_us) if 2 * (now_us - newest_us) > self._lease_us else None

    def _again(
        self, known: Lease, beat: mesh_pb2.Heartbeat, now_us: int
    ) -> tuple[WorkerUp | WorkerLost, ...]:
        """The next heartbeat of a process that has the lease."""
        if beat.leaving:
            return (self._end(beat.worker, now_us, "leaving"),)
        before = known.heartbeat
        if beat.sequence < before.sequence:
            self.stale += 1
            return ()
        weights = _weights(beat.memory)
        news = known.suspect or before.models != beat.models or before.stopping != beat.stopping
        given_up = _given_up(before, beat)
        news = news or _is_news(known.told, weights) or bool(given_up)
        known.heartbeat, known.seen_us, known.suspect = beat, now_us, False
        known.excused_us = 0
        known.rival_lives = bool(known.rival)
        if not news:
            return ()
        known.told = weights
        return (msgspec.structs.replace(self._up(beat, now_us), given_up=given_up),)

    def look(self, now_us: int) -> None:
        """Says that control looks, as it should `look_every_us` after `looked`; a gap of more than
        two of these is not held against the workers, who may have stood still with it. A worker is
        excused for one lease at most.
        """
        every_us = self.look_every_us
        before_us, self._looked_us = self._looked_us, now_us
        if before_us is None or now_us - before_us <= 2 * every_us:
            return
        for lease in self._leases.values():
            excused_us = min(
                now_us - before_us - every_us,
                self._lease_us - lease.excused_us,
                now_us - lease.seen_us,
            )
            lease.seen_us += excused_us
            lease.excused_us += excused_us

    def looked(self, now_us: int) -> None:
        """Says that control is through with what it did when it looked."""
        self._looked_us = now_us

    def expire(self, now_us: int) -> tuple[WorkerLost, ...]:
        """Ends every lease that is too old."""
        late = [
            name for name, lease in self._leases.items() if lease.seen_us + self._lease_us <= now_us
        ]
        return tuple(self._end(name, now_us, "lease") for name in sorted(late))

    def state(self, worker: str, now_us: int) -> WorkerUp:
        """What a living worker said last."""
        return self._up(self._leases[worker].heartbeat, now_us)

    def restate(self, now_us: int) -> tuple[WorkerUp, ...]:
        """All living workers with the latents they hold, for when messages were lost."""
        return tuple(self.state(name, now_us) for name in sorted(self._leases))

    def suspect(self, worker: str) -> None:
        if worker in self._leases:
            self._leases[worker].suspect = True

    def next_expiry_us(self) -> int | None:
        ends = [lease.seen_us + self._lease_us for lease in self._leases.values()]
        return min(ends) if ends else None

    def store_address(self, worker: str) -> str:
        lease = self._leases.get(worker)
        return lease.heartbeat.store_address if lease is not None else ""

    def models(self) -> tuple[generation_pb2.ModelInfo, ...]:
        """Models that living workers serve, each as all of them do together; by name."""
        beats = (self._leases[name].heartbeat for name in sorted(self._leases))
        found = together(model for beat in beats for model in beat.models)
        return tuple(found[name] for name in sorted(found))

    def _end(self, worker: str, now_us: int, reason: str) -> WorkerLost:
        del self._leases[worker]
        return WorkerLost(at_us=now_us, worker=worker, reason=reason)

    def _up(self, beat: mesh_pb2.Heartbeat, now_us: int) -> WorkerUp:
        ours = self.term is None or beat.term == self.term
        return _up(beat, now_us, tuple(beat.pending_sequences) if ours else ())


def _up(beat: mesh_pb2.Heartbeat, now_us: int, pending: tuple[int, ...]) -> WorkerUp:
    return WorkerUp(
        at_us=now_us,
        worker=beat.worker,
        incarnation=beat.incarnation,
        gpu=beat.device.profile_name,
        host=beat.host,
        shares_cores=beat.device.kind == "cpu",
        models=tuple(
            ModelFacts(
                name=model.name,
                degrees=tuple(model.degrees),
                batch_max=max(1, model.batch_max),
                halves=model.obeys_layout,
                operations=tuple(map(profile_name, model.operations)),
                parts=_parts(model),
            )
            for model in beat.models
        ),
        latents=tuple(
            Held(request=held.request_id, steps_done=held.steps_done, artifact=held.artifact)
            for held in beat.latents
        ),
        memory_mib=beat.memory.budget_bytes >> 20,
        weights=_weights(beat.memory),
        stopping=beat.stopping,
        pending=pending,
        operations=tuple(map(profile_name, beat.operations)),
    )


def _parts(model: generation_pb2.ModelInfo) -> tuple[NodeParts, ...]:
    """By node, in the order in which the worker names them."""
    found: dict[str, list[str]] = {}
    for named in model.parts:
        found.setdefault(named.node, []).append(named.part)
    return tuple(NodeParts(node=node, parts=tuple(parts)) for node, parts in found.items())


def _succeeds(beat: mesh_pb2.Heartbeat, first: mesh_pb2.Heartbeat) -> bool:
    """A supervisor has started it again: it says so, and its predecessor is known to be dead."""
    return beat.host == first.host and beat.restarts > first.restarts


def _given_up(before: mesh_pb2.Heartbeat, beat: mesh_pb2.Heartbeat) -> tuple[GroupHeld, ...]:
    """Groups that it had at the heartbeat before, and has no more."""
    stand = set(map(_group, beat.groups))
    return tuple(group for group in map(_group, before.groups) if group not in stand)


def _group(group: types_pb2.Group) -> GroupHeld:
    return GroupHeld(epoch=group.epoch, members=tuple(group.members))


def _weights(memory: types_pb2.Memory) -> tuple[PartFacts, ...]:
    """Of a worker whose memory is bounded; sizes are rounded up."""
    if not memory.budget_bytes:
        return ()
    return tuple(
        PartFacts(
            model=part.model,
            node=part.node,
            mib=-(-part.size_bytes // _MIB),
            peak_mib=-(-part.peak_bytes // _MIB),
            load_us=part.load_time_us,
            resident=part.resident,
            part=part.part,
        )
        for part in memory.parts
    )


def _is_news(told: tuple[PartFacts, ...], now: tuple[PartFacts, ...]) -> bool:
    """Sizes that changed, load times that changed a lot. What is resident changes all the time: see
    `Intake`.
    """
    before = {(part.model, part.node, part.part): part for part in told}
    for part in now:
        was = before.get((part.model, part.node, part.part))
        if was is None or (was.mib, was.peak_mib) != (part.mib, part.peak_mib):
            return True
        slower, faster = sorted((was.load_us, part.load_us), reverse=True)
        if slower > _LOAD_CHANGED * max(faster, _LOAD_SHORT_US):
            return True
    return False
