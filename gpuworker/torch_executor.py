"""The real executor: one compute thread around an `Engine`, one device, real collectives."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path
from typing import NoReturn

import torch

from gpuworker.attention.exchange import ParallelAttention
from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.rendezvous import Cancel, Rendezvous
from gpuworker.collectives.tunnel import Tunnel
from gpuworker.executor import CLOSE_PATIENCE_S, Listener, Room, always_room
from gpuworker.folders.identity import FileDigests
from gpuworker.loading import LoadError, load_card
from gpuworker.memory.budget import Memory
from gpuworker.memory.latents import LatentShelf, Shares
from gpuworker.memory.weights import WeightStore
from gpuworker.mesh.copies import Copies
from gpuworker.mesh.input_reader import InputReader
from gpuworker.model_info import models_info
from gpuworker.models.card import ModelCard, ModelRefused
from gpuworker.operations.names import ROLES, WEIGHTLESS
from gpuworker.prompts import PromptCache
from gpuworker.steps.encoding import EncodingThreads
from gpuworker.steps.engine import Engine
from gpuworker.steps.fetching import Fetcher
from gpuworker.steps.inbox import Inbox, StopMark
from gpuworker.steps.pace import pace_of
from gpuworker.steps.prefetch import AHEAD, Ahead, Arrivals, Prefetch
from gpuworker.steps.sources import Sources
from hocket.clock import steady_ns
from hocket.errors import HocketError
from hocket.messaging.bus import Bus, Subjects
from hocket.security.identity import Identity
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

_OFFERING_THREADS = 16
_AWAITING_THREADS = 256
_ASK_POLL_S = 0.02  # whether an asking was called off
_ASK_MARGIN_US = 500_000  # the answer's way back, beyond the holder's own waiting time


class TorchExecutor:
    """Runs assignments with torch on one device."""

    def __init__(
        self,
        worker: str,
        cards: dict[str, ModelCard],
        device: torch.device,
        gpu: str,
        bus: Bus,
        subjects: Subjects,
        *,
        weights: WeightStore,
        shares: Shares,
        advertise: str,
        groups_max: int,
        batch_max: int = 1,
        alone: bool = False,
        identity: Identity | None = None,
        ahead: Ahead = AHEAD,
        store_of: Callable[[str, Tunnel | None], Rendezvous] = Rendezvous,
    ) -> None:
        """`alone`: no groups, because NCCL takes no two workers on one GPU. With an identity, other
        workers reach this one's store by mutual TLS only. `store_of` makes that store.
        """
        self._bus = bus
        self._subjects = subjects
        self._cards = cards
        self._torch_device = device
        self._gpu = gpu
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox()
        tunnel = Tunnel(identity) if identity is not None else None
        self._rendezvous = store_of(advertise, tunnel)
        self._groups = GroupCache(self._rendezvous, worker, device, groups_max)
        prompts = _prompts(cards, shares)
        arrivals = Arrivals()
        self._shelf = _shelf(self._rendezvous, shares, prompts, arrivals)
        fetcher = Fetcher(worker, self._rendezvous, self._ask)
        self._ahead = Prefetch(worker, self._inbox, self._shelf, fetcher, ahead, arrivals)
        self._files = InputReader(bus, subjects.input_bucket)
        self._encoding = encoding = EncodingThreads()
        self._memory = Memory(
            cards,
            device,
            weights,
            self._shelf,
            shares.device_bytes,
            lambda: encoding.size_bytes,
            prompts,
        )
        self._engine = Engine(
            worker,
            cards,
            self._inbox,
            self._shelf,
            self._groups,
            Sources(worker, self._inbox, self._shelf, fetcher, self._ahead),
            pace_of(device),
            self._memory,
            encoding,
            self._files,
        )
        self._copies = Copies(worker, self._shelf, self._rendezvous, self._ask)
        self._offering = ThreadPoolExecutor(_OFFERING_THREADS, "offer")
        self._awaiting = ThreadPoolExecutor(_AWAITING_THREADS, "await")
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Future[NoReturn] = self._loop.create_future()
        self.models = models_info(cards, weights, batch_max, alone=alone)
        self.operations = WEIGHTLESS
        self.store_address = self._rendezvous.address

    @property
    def device(self) -> mesh_pb2.Device:
        if self._torch_device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._torch_device)
            name = torch.cuda.get_device_name(self._torch_device)
            used = total - free
        else:
            total, used, name = *_host_memory(), "CPU"
        return mesh_pb2.Device(
            kind=self._torch_device.type,
            profile_name=self._gpu,
            name=name,
            memory_total_bytes=total,
            memory_used_bytes=used,
        )

    @property
    def memory(self) -> types_pb2.Memory:
        facts = self._memory.facts()
        facts.ahead_bytes, facts.ahead_taken = self._ahead.size_bytes, self._ahead.taken
        return facts

    def start(self, listener: Listener, room: Room = always_room) -> None:
        """The compute thread blocks in a listener that has no room."""
        self._thread = threading.Thread(
            target=self._compute, args=(listener,), name="compute", daemon=True
        )
        self._thread.start()

    async def failed(self) -> NoReturn:
        await asyncio.shield(self._ended)
        raise AssertionError("an executor ends by an exception")

    def accept_term(self, term: int) -> bool:
        accepted = self._inbox.accept_term(term)
        if accepted:
            self._memory.forget_before(term)
            self._ahead.forget_before(term)
        return accepted

    def plan_loads(self, loads: Sequence[mesh_pb2.WeightsLoad]) -> None:
        self._memory.plan_loads(loads)

    def submit(self, assignment: mesh_pb2.Assignment) -> None:
        self._memory.expect(assignment)
        self._files.want(assignment)
        self._ahead.want(assignment)
        self._inbox.put(assignment)

    def truncate(self, truncate: mesh_pb2.Truncate) -> None:
        self._inbox.truncate(truncate.request_id, StopMark(truncate.attempt, truncate.stop_at_step))
        if truncate.release:
            self.release(truncate.request_id)

    def release(self, request: str) -> None:
        self._copies.release(request)
        self._shelf.release(request)

    def fetch(self, wanted: mesh_pb2.LatentFetch) -> None:
        self._copies.want(wanted)

    def groups(self) -> tuple[types_pb2.Group, ...]:
        return tuple(
            types_pb2.Group(epoch=epoch, members=members) for epoch, members in self._groups.names()
        )

    def is_idle(self) -> bool:
        lent = self._shelf.offered_bytes or self._copies.under_way
        return not (lent or self._shelf.held() or self._inbox.pending())

    async def tidy(self) -> None:
        if self._shelf.offered_bytes:
            await self._loop.run_in_executor(self._offering, self._shelf.tidy)

    def held(self) -> tuple[mesh_pb2.HeldLatent, ...]:
        return self._shelf.held()

    def progress(self) -> tuple[int, int]:
        return self._inbox.term, self._inbox.sequence

    def pending(self) -> tuple[int, ...]:
        return self._inbox.pending()

    async def offer_latent(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        # Who waits for a step takes no thread from those whose artifact is here.
        threads = self._offering if self._shelf.has(asked) else self._awaiting
        return await self._loop.run_in_executor(threads, self._shelf.offer, asked)

    async def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        self._ended.cancel()
        self._inbox.close()
        self._files.close()
        self._ahead.close()
        self._copies.close()
        self._groups.abort()
        self._encoding.stop()
        end_ns = steady_ns() + int(patience_s * 1e9)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, patience_s)
        await asyncio.to_thread(self._encoding.close, max(0, end_ns - steady_ns()) / 1e9)
        await asyncio.to_thread(self._memory.close)
        for threads in (self._offering, self._awaiting):
            threads.shutdown(wait=False, cancel_futures=True)
        self._groups.close()
        self._rendezvous.close()

    def _compute(self, listener: Listener) -> None:
        """The compute thread. Whatever ends it but `close` ends the process, see `failed`."""
        try:
            self._engine.run(listener)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _ask(
        self, holder: str, asked: mesh_pb2.LatentRequest, cancel: Cancel
    ) -> mesh_pb2.LatentReply:
        """Called from other threads: asks another worker's agent through this one's."""
        answer = asyncio.run_coroutine_threadsafe(
            self._bus.request(
                self._subjects.latent(holder),
                asked,
                mesh_pb2.LatentReply,
                asked.wait_us + _ASK_MARGIN_US,
            ),
            self._loop,
        )
        while True:
            try:
                return answer.result(_ASK_POLL_S)
            except StillWaiting:
                if not answer.done() and not cancel.is_set():
                    continue
                answer.cancel()
                failure = types_pb2.Failure(reason="CANCELLED", message="called off")
            except HocketError as error:
                failure = types_pb2.Failure(reason=error.reason, message=str(error))
            return mesh_pb2.LatentReply(failure=failure)


def _prompts(cards: Mapping[str, ModelCard], shares: Shares) -> PromptCache:
    """One for all models."""
    prompts = PromptCache(shares.prompts_bytes)
    for card in cards.values():
        card.prompts = prompts
    return prompts


def _shelf(
    store: Rendezvous, shares: Shares, prompts: PromptCache, arrivals: Arrivals
) -> LatentShelf:
    return LatentShelf(
        store.put,
        store.drop,
        shares,
        store.fetched,
        beside=lambda: prompts.size_bytes,
        arriving=lambda: arrivals.size_bytes,
    )


def load_cards(
    sources: tuple[str, ...],
    device: torch.device,
    weights: WeightStore,
    *,
    compiled: bool = False,
    attention: ParallelAttention | None = None,
    digests: FileDigests | None = None,
    roles: Collection[str] = ROLES,
) -> dict[str, ModelCard]:
    """Loads every model, by name; the weights are the store's, those that models share once, those
    of other roles not at all.

    Raises LoadError naming what is missing, and BudgetTooSmall.
    """
    digests = digests or FileDigests()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cards: dict[str, ModelCard] = {}
    for source in sources:
        card = load_card(source, device, dtype, weights, digests, roles)
        if (name := card.facts.name) in cards:
            reason = "two models have this name; NAME=PATH gives one of them another"
            raise LoadError(source, name, reason)
        if attention is not None:
            card.attend_by(attention)
        if compiled and "dit" in roles:
            try:
                card.compile()
            except ModelRefused as refused:
                raise LoadError(source, refused.part, refused.reason) from refused
            if not weights.budget_bytes and "text" in roles:  # else they are not there (yet)
                card.warm()
        cards[name] = card
    return cards


def pick_device(wanted: str, index: int) -> torch.device:
    """The device of the index-th worker on this host."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(1)  # workers share cores: spinning OpenMP teams cost 80 times (docs)
        return torch.device("cpu")
    device = torch.device("cuda", index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _host_memory() -> tuple[int, int]:
    """(total, used by this process), in bytes; cheap, since each heartbeat asks."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        used = int(Path("/proc/self/statm").read_text().split()[1]) * page
    except OSError:  # no Linux: the most that it ever was
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return os.sysconf("SC_PHYS_PAGES") * page, used
