"""Names of everything on the broker that belongs to one cluster.

No user text ever stands in a subject.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


def token(name: str) -> str:
    """A name as one token of a subject, whatever characters it has."""
    return name if _PLAIN.fullmatch(name) else f"~{name.encode().hex()}"


def name_of(part: str) -> str:
    """The name that a token stands for."""
    return bytes.fromhex(part[1:]).decode() if part.startswith("~") else part


def input_object(tenant: str, name: str) -> str:
    """What the store of inputs calls a tenant's file that requests call `name`."""
    return f"{tenant}/{name}"


@dataclass(frozen=True)
class Subjects:
    """Subject names of one cluster."""

    cluster: str

    def assign(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.assign.{worker}"

    def truncate(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.truncate.{worker}"

    def report(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.report.{worker}"

    def heartbeat(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.heartbeat.{worker}"

    def latent(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.latent.{worker}"

    def event(self, request: str) -> str:
        return f"hocket.v1.{self.cluster}.event.{request}"

    def journal(self, entry: str) -> str:
        return f"hocket.v1.{self.cluster}.journal.{entry}"

    def promise(self, request: str) -> str:
        return f"hocket.v1.{self.cluster}.promise.request.{token(request)}"

    def drain(self, worker: str) -> str:
        return f"hocket.v1.{self.cluster}.promise.drain.{token(worker)}"

    def fence(self, lane: int | str) -> str:
        return f"hocket.v1.{self.cluster}.promise.fence.{lane}"

    @property
    def promises(self) -> str:
        """All of the promises stream."""
        return f"hocket.v1.{self.cluster}.promise.>"

    @property
    def promises_stream(self) -> str:
        return f"hocket-{self.cluster}-promises"

    def replica(self, name: str) -> str:
        return f"hocket.v1.{self.cluster}.replica.{name}"

    @property
    def journal_stream(self) -> str:
        return f"hocket-{self.cluster}-journal"

    @property
    def media_bucket(self) -> str:
        return f"hocket-{self.cluster}-media"

    @property
    def latency_bucket(self) -> str:
        return f"hocket-{self.cluster}-latencies"

    @property
    def workflow_bucket(self) -> str:
        return f"hocket-{self.cluster}-workflows"

    def workflow(self, name: str) -> str:
        return f"$KV.{self.workflow_bucket}.{token(name)}"

    @property
    def input_bucket(self) -> str:
        return f"hocket-{self.cluster}-inputs"

    @property
    def leader_bucket(self) -> str:
        return f"hocket-{self.cluster}-leader"
