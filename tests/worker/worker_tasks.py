"""What test workers do: functions of a `Member`, to be run by a `Pool`."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpuworker.attention.exchange import AttentionInputs, ulysses
from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.groups import Group, GroupLost, GroupSpent
from gpuworker.collectives.rendezvous import BlobLost
from gpuworker.collectives.team import Communicator, GroupLayout, Team
from gpuworker.models.card import Asked, ModelCard
from gpuworker.state import LatentState
from tests.worker.tiny_models import Start
from tests.worker.worker_pool import CPU, Member

FORM_S = 20.0


@dataclass(frozen=True)
class Meeting:
    """A group to be used: its name, where it meets, and the time-out of its collectives."""

    epoch: int
    members: tuple[str, ...]
    address: str
    timeout_s: float = 20.0

    def join(self, member: Member) -> Group:
        """The group, cached or formed."""
        group = member.groups.get(self.epoch, self.members, self.address, FORM_S)
        group.timeout_s = self.timeout_s
        return group


@dataclass(frozen=True)
class Loss:
    """A GroupLost (or, without members, a BlobLost) as it travels through a pipe."""

    cause: str
    suspects: tuple[str, ...]
    members: tuple[str, ...] = ()
    spent: tuple[str, ...] = ()  # members that have only given the group up

    @classmethod
    def of(cls, lost: GroupLost) -> Loss:
        spent = lost.spent if isinstance(lost, GroupSpent) else ()
        return cls(lost.cause, lost.suspects, lost.members, spent)


@dataclass(frozen=True)
class Segment:
    """Some steps of a job on one group, and where the state before them is."""

    folder: str
    job: str
    meeting: Meeting
    steps: int
    source: int  # rank of the member that has the state, or fetches it
    fetch_from: str = ""  # a store address; the source fetches the state there first
    layout: GroupLayout | None = None  # None: Ulysses over all members
    plant: str = ""  # a fault to be planted: "reversed gather" or "suicide"


def encode(
    member: Member, folder: str, job: str, settings: dict[str, Any], start: Start | None = None
) -> None:
    """Makes the first state of a job, and keeps it."""
    member.shelf[job] = first_state(member.card(folder), settings, start)


def first_state(card: ModelCard, settings: dict[str, Any], start: Start | None) -> LatentState:
    """Encoded, or begun from a picture; every artifact of the way has travelled as bytes."""
    if start is None:
        return card.encode(**settings)
    asked = Asked(**settings)
    embeddings = _travelled(card.embed(asked))
    latents, reference, control = (
        None if pixels is None else _travelled(card.encode_image(pixels, asked.seed))
        for pixels in (start.pixels, start.reference, start.control)
    )
    return card.begin(
        embeddings,
        asked,
        latents,
        start.strength,
        start.mask,
        reference,
        dict(start.loras),
        control,
        start.control_scale,
    )


def _travelled(artifact: LatentState) -> LatentState:
    return LatentState.from_bytes(artifact.to_bytes())


def offer(member: Member, job: str) -> None:
    """Puts the state of a job into the member's store."""
    member.rendezvous.put(job, member.shelf[job].to_bytes())


def forget(member: Member, job: str) -> None:
    """Drops a job."""
    member.shelf.pop(job, None)
    member.rendezvous.drop(job)


def blob(member: Member, job: str) -> bytes:
    """The state of a job, as bytes."""
    return member.shelf[job].to_bytes()


def pictures(member: Member, folder: str, job: str) -> object:
    """The decoded frames of a job."""
    return member.card(folder).decode(member.shelf[job])


def denoise(member: Member, segment: Segment) -> int | Loss:
    """Runs a segment; the steps done, or how the group was lost (the last good state is kept)."""
    try:
        group = segment.meeting.join(member)
        state = _received(member, segment, group)
        member.shelf[segment.job] = state
        layout = segment.layout or GroupLayout(ulysses=group.size)
        team = Team(_planted(member, segment.plant, group), layout)
        # Before each step the first member settles whether to go on: the word is steps to do.
        for step in itertools.count():
            if step >= group.broadcast_word(segment.steps if group.rank == 0 else None):
                break
            (state,) = member.card(segment.folder).step([state], team)
            member.shelf[segment.job] = state
            member.groups.acknowledge()
        return state.steps_done
    except GroupLost as lost:
        return Loss.of(lost)


@dataclass(frozen=True)
class Batch:
    """Jobs of one shape that step together, each with so many steps behind it when they meet."""

    folder: str
    settings: tuple[dict[str, Any], ...]
    behind: tuple[int, ...]
    meeting: Meeting
    layout: GroupLayout
    start: Start | None = None  # of the first job


def step_together(member: Member, batch: Batch) -> bytes:
    """The first job's last state; the others join where they stand and leave when they are done."""
    group, card = batch.meeting.join(member), member.card(batch.folder)
    team = Team(group, batch.layout) if group.size > 1 else None
    starts = [batch.start] + [None] * (len(batch.settings) - 1)
    states = [first_state(card, *job) for job in zip(batch.settings, starts, strict=True)]
    for place, behind in enumerate(batch.behind):
        for _ in range(behind):
            (states[place],) = card.step([states[place]], None)
    while not states[0].finished:
        going = [place for place, state in enumerate(states) if not state.finished]
        stepped = card.step([states[place] for place in going], team)
        for place, state in zip(going, stepped, strict=True):
            states[place] = state
    return states[0].to_bytes()


def _received(member: Member, segment: Segment, group: Group) -> LatentState:
    mine: bytes | None = None
    if group.rank == segment.source:
        if segment.fetch_from:
            mine = member.rendezvous.fetch(segment.fetch_from, segment.job, FORM_S)
        else:
            mine = member.shelf[segment.job].to_bytes()
    return LatentState.from_bytes(group.broadcast_blob(mine, segment.source))


def _planted(member: Member, plant: str, group: Group) -> Communicator:
    if plant == "reversed gather":
        return ReversedGather(group)
    if plant == "suicide" and group.rank == group.size - 1:
        return Suicide(group, member, after=5)
    return group


class ReversedGather:
    """A faulty communicator: joins shards in the wrong order."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._group.all_to_all(flat, send, receive)

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        whole = self._group.all_gather(shard, dim, lengths)
        return torch.cat(torch.split(whole, list(lengths), dim)[::-1], dim)


class Suicide(ReversedGather):
    """Kills its process at the n-th exchange, having said so."""

    def __init__(self, group: Group, member: Member, after: int) -> None:
        super().__init__(group)
        self._member, self._left = member, after

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        self._left -= 1
        if self._left == 0:
            self._member.notes.send("dies")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().all_to_all(flat, send, receive)


def fresh_cache(member: Member, capacity: int) -> None:
    """Gives the member an empty group cache."""
    member.groups.close()
    member.groups = GroupCache(member.rendezvous, member.name, CPU, capacity)


def cached(member: Member) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Names of the cached groups."""
    return member.groups.names()


def acknowledge(member: Member) -> None:
    """Says that a step has ended everywhere."""
    member.groups.acknowledge()


def join(
    member: Member, meeting: Meeting, form_s: float = FORM_S, cancel_after_s: float | None = None
) -> bool | Loss:
    """Joins a group; true, or the loss."""
    cancel = threading.Event()
    if cancel_after_s is not None:
        threading.Timer(cancel_after_s, cancel.set).start()
    try:
        member.groups.get(meeting.epoch, meeting.members, meeting.address, form_s, cancel)
    except GroupLost as lost:
        return Loss.of(lost)
    return True


def rank_sum(member: Member, meeting: Meeting) -> int | Loss:
    """One collective over the group: every member learns the sum of all ranks."""
    try:
        group = meeting.join(member)
        member.notes.send("joined")
    except GroupLost as lost:
        return Loss.of(lost)
    try:
        ranks = group.all_gather(torch.tensor([group.rank]), 0, [1] * group.size)
        return int(ranks.sum())
    except GroupLost as lost:
        return replace(Loss.of(lost), spent=member.groups.spent_by(group))


def store_keys(member: Member) -> int:
    """How many keys stand in this member's store."""
    return len(member.rendezvous.client(member.rendezvous.address).list_keys())


def part_sums(member: Member, meeting: Meeting, parts: tuple[tuple[int, ...], ...]) -> list[int]:
    """Of each part that this member is in: the sum of its ranks, over a channel of its own."""
    group, sums = meeting.join(member), []
    assert group.channel(range(group.size)) is group.channel(range(group.size))
    for part in parts:
        if group.rank in part:
            rank = torch.tensor([group.rank])
            group.channel(part).allreduce([rank]).wait()
            assert group.channel(part) is group.channel(part), "formed once"
            sums.append(int(rank))
    group.broadcast_word(0 if group.rank == 0 else None)  # nobody leaves before the others
    return sums


def own_of_a_second(member: Member, meeting: Meeting, goes_around: bool) -> int | None:
    """What is a member's own of a step of one second with an exchange, in µs; None: not known."""
    group = meeting.join(member)
    waited = group.watch()
    if goes_around:
        group.channel(range(group.size)).allreduce([torch.zeros(1)]).wait()
    else:
        group.all_gather(torch.zeros(1), 0, [1] * group.size)
    group.unwatch()
    group.share_words(group.rank)  # nobody leaves before the others, and no part of the step
    return waited.own_us(1_000_000)


def join_and_abort(member: Member, meeting: Meeting) -> None:
    """Joins a group and gives it up, as a worker does that ran out of memory."""
    group = meeting.join(member)
    member.notes.send("joined")
    group.abort("out of memory")


def collectives(member: Member, meeting: Meeting, lengths: tuple[int, ...]) -> list[object]:
    """Uneven gather and exchange, words, blobs and tensors; each member's results as lists."""
    group = meeting.join(member)
    mine = torch.full((2, lengths[group.rank]), float(group.rank))
    gathered = group.all_gather(mine, 1, lengths)
    # To member r go r + 1 elements, each 10 * sender + receiver.
    send = [r + 1 for r in range(group.size)]
    flat = torch.cat([torch.full((n,), 10 * group.rank + r) for r, n in enumerate(send)])
    exchanged = group.all_to_all(flat, send, [group.rank + 1] * group.size)
    word = group.broadcast_word(-(1 << 40) if group.rank == 1 else None, src=1)
    words = group.share_words(group.rank, -(1 << 40))
    text = group.broadcast_blob(b"latent" * 1000 if group.rank == 0 else None)
    empty = group.broadcast_blob(b"" if group.rank == 0 else None)
    tensor = group.broadcast(torch.full((3,), float(group.rank)), src=group.size - 1)
    sizes = [len(text), len(empty)]
    return [gathered.tolist(), exchanged.tolist(), word, words, *sizes, tensor.tolist()]


def masked_attention(member: Member, meeting: Meeting, lengths: tuple[int, ...]) -> list[float]:
    """Errors of split attention against whole attention, for each shape of a mask of keys."""
    group = meeting.join(member)
    generator = torch.Generator().manual_seed(3)
    tokens, heads = sum(lengths), 4
    whole = torch.randn(3, 2, tokens, heads, 8, generator=generator)
    start, here = sum(lengths[: group.rank]), lengths[group.rank]
    errors = []
    for shape in ((2, tokens), (2, 1, 1, tokens), (2, heads, 1, tokens)):
        mask = torch.rand(shape, generator=generator) < 0.5
        mask[..., 0] = True
        query, key, value = whole.narrow(2, start, here).unbind()
        inputs = AttentionInputs(query, key, value, mask.narrow(-1, start, here), lengths)
        split = ulysses(group, _attention, inputs, {})
        expected = _attention(whole[0], whole[1], whole[2], mask).narrow(1, start, here)
        errors.append(float((split - expected).abs().max()))
    return errors


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    mask = attn_mask[:, None, None] if attn_mask.ndim == 2 else attn_mask
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def fetch(member: Member, address: str, key: str, timeout_s: float) -> bytes | Loss:
    """Fetches a blob from another member's store."""
    try:
        return member.rendezvous.fetch(address, key, timeout_s)
    except BlobLost as lost:
        return Loss(lost.cause, ())


def put(member: Member, key: str, size: int) -> None:
    """Offers a blob of `size` bytes."""
    member.rendezvous.put(key, bytes(range(256)) * (size // 256))


def drop(member: Member, key: str) -> None:
    """Takes a blob back."""
    member.rendezvous.drop(key)
