"""Registered workflows: one key of a NATS KV bucket each, with its versions, the newest first.

Only the leader writes, and each write names the revision that it read, so that two leaders that
overlap for a moment overwrite nothing of each other. A leader reads the bucket at the first call
that needs it; a broker that is away fails that call alone. What requests run is not read from here:
each brings its workflow along, and keeps it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from hocket.errors import BrokerUnavailable, InvalidRequest, Refused, Violation
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import (
    AppendCondition,
    EntryTooLarge,
    Log,
    LogFull,
    LogMoved,
    LogShape,
    OutcomeUnknown,
)
from hocket.messaging.subjects import name_of
from hocket.v1 import journal_pb2
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.checking import faults
from hocket.workflows.content import DIGEST_LEAST, digest_of, is_called, parsed_name
from hocket.workflows.shipped import faults_of_name, shipped

log = logging.getLogger(__name__)

NAMES_MAX = 256
VERSIONS_MAX = 16  # of a name; the oldest go
LISTED_BYTES_MAX = 3 << 20  # of the newest versions together: a list is one message, of 4 MiB
_TRIES = 3


@dataclass(frozen=True)
class _StoredName:
    versions: tuple[WorkflowSpec, ...]  # none: deleted
    revision: int


class WorkflowRegistry:
    """One leader's. Calls follow each other."""

    def __init__(self, bus: Bus, subjects: Subjects, replicas: int = 1) -> None:
        """`replicas`: copies of the bucket, in a cluster of brokers."""
        self._bus = bus
        self._subjects = subjects
        self._replicas = replicas
        self._log: Log | None = None
        self._stored: dict[str, _StoredName] = {}
        self._turn = asyncio.Lock()

    async def register(self, spec: WorkflowSpec, *, only_check: bool = False) -> WorkflowSpec:
        """The workflow as it is registered now, with its digest.

        Raises InvalidRequest with all faults, Refused where there is no room, BrokerUnavailable.
        """
        if violations := faults(spec) + faults_of_name(spec.name):
            raise InvalidRequest(violations)
        made = WorkflowSpec()
        made.CopyFrom(spec)
        made.digest, made.shipped = digest_of(made), False
        if not only_check:
            async with self._turn:
                await self._put(made)
        return made

    async def all(self) -> tuple[WorkflowSpec, ...]:
        """The newest version of each, by name, with the shipped ones. Raises BrokerUnavailable."""
        async with self._turn:
            await self._load()
        newest = [kept.versions[0] for kept in self._stored.values() if kept.versions]
        return tuple(sorted((*newest, *shipped().values()), key=lambda spec: spec.name))

    async def get(self, name: str) -> WorkflowSpec:
        """By "name" or "name@digest". Raises InvalidRequest, Refused (UNKNOWN_WORKFLOW),
        BrokerUnavailable."""
        base, digest = _parsed(name)
        if base in shipped():
            known: tuple[WorkflowSpec, ...] = (shipped()[base],)
        else:
            async with self._turn:
                await self._load()
            kept = self._stored.get(base)
            known = kept.versions if kept is not None else ()
        found = [spec for spec in known if is_called(spec, base, digest)]
        if not found:
            raise await self._unknown(name)
        return found[0]

    async def delete(self, name: str) -> None:
        """Forgets all versions of a name. Raises InvalidRequest, Refused (UNKNOWN_WORKFLOW),
        BrokerUnavailable."""
        if violations := faults_of_name(name):
            raise InvalidRequest(violations)
        async with self._turn:
            for _ in range(_TRIES):
                await self._load()
                kept = self._stored.get(name)
                if kept is None or not kept.versions:
                    break
                if await self._write(name, (), kept.revision):
                    return
        raise await self._unknown(name)

    async def _put(self, made: WorkflowSpec) -> None:
        for _ in range(_TRIES):
            await self._load()
            kept = self._stored.get(made.name, _StoredName((), 0))
            if kept.versions and kept.versions[0].digest == made.digest:
                return
            self._check_room(made)
            older = [spec for spec in kept.versions if spec.digest != made.digest]
            if await self._write(made.name, (made, *older)[:VERSIONS_MAX], kept.revision):
                log.info("registered the workflow %s, %s", made.name, made.digest)
                return
        raise BrokerUnavailable("JetStream", f"others change {made.name} all the time")

    async def _write(self, name: str, versions: tuple[WorkflowSpec, ...], revision: int) -> bool:
        """False: somebody else has written since it was read."""
        assert self._log is not None, "it was read"
        subject = self._subjects.workflow(name)
        content = journal_pb2.StoredWorkflow(versions=versions).SerializeToString()
        try:
            fresh = await self._log.append(
                subject, content, guard=AppendCondition(subject, revision)
            )
        except LogMoved:
            self._log = None
            return False
        except OutcomeUnknown as error:
            self._log = None
            raise BrokerUnavailable("JetStream", str(error)) from error
        except (EntryTooLarge, LogFull) as error:
            raise Refused("TOO_MANY_WORKFLOWS", str(error)) from error
        self._stored[name] = _StoredName(versions, fresh)
        return True

    async def _load(self) -> None:
        """What the bucket holds, where that is not known."""
        if self._log is not None:
            return
        bucket = self._subjects.workflow_bucket
        shape = LogShape(
            name=f"KV_{bucket}",
            subjects=(f"$KV.{bucket}.>",),
            newest_only=True,
            keeps=True,
            replicas=self._replicas,
        )
        stored = await Log.open(self._bus, shape)
        found: dict[str, _StoredName] = {}
        async for entry in stored.read(f"$KV.{bucket}.>"):
            try:
                name = name_of(entry.subject.rpartition(".")[2])
                versions = journal_pb2.StoredWorkflow.FromString(entry.data).versions
            except (DecodeError, ValueError) as error:
                log.warning("a stored workflow is left out: %s: %s", entry.subject, error)
                continue
            found[name] = _StoredName(tuple(versions), entry.sequence)
        self._stored, self._log = found, stored

    def _check_room(self, made: WorkflowSpec) -> None:
        others = [
            kept.versions[0]
            for name, kept in self._stored.items()
            if kept.versions and name != made.name
        ]
        told = ""
        if len(others) >= NAMES_MAX:
            told = f"{NAMES_MAX} workflows are registered, the limit of a cluster"
        elif made.ByteSize() + sum(spec.ByteSize() for spec in others) > LISTED_BYTES_MAX:
            told = f"the workflows take {LISTED_BYTES_MAX} bytes together, the limit of a cluster"
        if told:
            raise Refused("TOO_MANY_WORKFLOWS", told)

    async def _unknown(self, name: str) -> Refused:
        known = ", ".join(spec.name for spec in await self.all())
        return Refused("UNKNOWN_WORKFLOW", f"no workflow {name[:100]!r} is known; known: {known}")


def _parsed(name: str) -> tuple[str, str]:
    parsed = parsed_name(name)
    if parsed is None:
        allowed = f"a name, or name@digest with {DIGEST_LEAST} or more hex digits"
        raise InvalidRequest((Violation("name", f"found {name[:100]!r}; allowed: {allowed}"),))
    return parsed
