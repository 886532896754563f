"""Holders of artifacts for tests: a store, a shelf, and answers to whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gpuworker.collectives.rendezvous import Cancel, Rendezvous
from gpuworker.memory.latents import LatentShelf, Shares
from gpuworker.operations.names import CallInput, operation_of, wanted_by
from gpuworker.state import LatentState
from hocket.v1 import mesh_pb2, types_pb2

LATENT_BYTES = 1 << 20


def state(steps_done: int, size_bytes: int = LATENT_BYTES) -> LatentState:
    """A latent of float32, told from others by its steps."""
    latents = torch.full((size_bytes // 4,), float(steps_done))
    return LatentState({"latents": latents}, steps_done, 50, {})


@dataclass
class Holder:
    """A worker's store and shelf, which answers whoever asks."""

    name: str
    shares: Shares | None = None
    rendezvous: Rendezvous = field(default_factory=Rendezvous)

    def __post_init__(self) -> None:
        store = self.rendezvous
        self.shelf = LatentShelf(store.put, store.drop, self.shares, store.fetched)

    @property
    def known(self) -> types_pb2.LatentHolder:
        return types_pb2.LatentHolder(
            worker=self.name, steps_done=0, store_address=self.rendezvous.address
        )

    @property
    def keys(self) -> list[str]:
        return list(self.rendezvous.client(self.rendezvous.address).list_keys())


@dataclass
class Asking:
    """What a worker asks: who answers what, and whom it has asked."""

    answers: dict[str, Callable[[mesh_pb2.LatentRequest], mesh_pb2.LatentReply]]
    seen: list[str] = field(default_factory=list)

    def __call__(
        self, holder: str, wanted: mesh_pb2.LatentRequest, cancel: Cancel
    ) -> mesh_pb2.LatentReply:
        self.seen.append(holder)
        return self.answers[holder](wanted)


def wanting(*holders: types_pb2.LatentHolder) -> mesh_pb2.Assignment:
    member = mesh_pb2.BatchMember(request_id="r", holders=holders)
    return mesh_pb2.Assignment(
        sequence=1,
        term=1,
        node="dit",
        steps=1,
        batch=[member],
        group=types_pb2.Group(epoch=1, members=["me"]),
        collective_timeout_us=20_000_000,
    )


def start_of(order: mesh_pb2.Assignment) -> tuple[mesh_pb2.BatchMember, CallInput]:
    """The first job, and the latents that it starts from."""
    member = order.batch[0]
    return member, wanted_by(operation_of(order), member)[0]


def gone_address() -> str:
    """Where nobody listens any more."""
    rendezvous = Rendezvous()
    address = rendezvous.address
    rendezvous.close()
    return address
