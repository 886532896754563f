"""A group and the way its members share one step: cfg x ring x ulysses.

      rank = (half * ring + link) * ulysses + place

    half   which half of classifier-free guidance (0: prompted, 1: unconditional)
    link   which part of the sequence the keys and values of which travel around the ring
    place  which heads, within a link (Ulysses)

Members of one half hold the whole sequence between them; `SubCommunicator` lets them exchange among
themselves through the one communicator of the group. No group is formed for it, and a layout may
change at every step. Both halves make the same exchanges in the same order, so none waits for one
skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Lengths = tuple[int, ...]  # tokens of each member, in rank order


class Communicator(Protocol):
    """What a step asks of its group (see groups.Group)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Exchanges pieces of a 1-D tensor; `send` and `receive` count elements by rank."""

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """Joins every member's shard along `dim`; `lengths` are the shards' sizes there."""


def split_lengths(total: int, parts: int) -> Lengths:
    """`total` tokens over `parts` members, the first ones taking the rest (torch.tensor_split)."""
    each, rest = divmod(total, parts)
    return tuple(each + (rank < rest) for rank in range(parts))


class LayoutRefused(Exception):
    """A layout that a step cannot have. Fields: `field`, the bad `value`, what is `allowed`."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value}: allowed is {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


@dataclass(frozen=True)
class GroupLayout:
    """How the members of a group share one step; the product is the degree."""

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        if self.cfg not in (1, 2):
            raise LayoutRefused("layout.cfg", self.cfg, "1 or 2")
        for field, value in (("ulysses", self.ulysses), ("ring", self.ring)):
            if value < 1:
                raise LayoutRefused(f"layout.{field}", value, "at least 1")

    @property
    def degree(self) -> int:
        """Members that it takes."""
        return self.cfg * self.ulysses * self.ring

    @property
    def sequence(self) -> int:
        """Members that one sequence is split over."""
        return self.ulysses * self.ring


class SubCommunicator:
    """Some members of a group, in order; a communicator among themselves.

    The other members of the group must be in parts of their own that make exchanges of the same
    number: each is one exchange of the whole group.
    """

    def __init__(self, whole: Communicator, ranks: Sequence[int]) -> None:
        self._whole, self.ranks = whole, tuple(ranks)
        self.rank, self.size = self.ranks.index(whole.rank), len(self.ranks)

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """As `Communicator.all_to_all`; counts are by rank within the part, whose order is kept."""
        return self._whole.all_to_all(flat, self._spread(send), self._spread(receive))

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """As `Communicator.all_gather`, among the part's members."""
        moved = shard.movedim(dim, 0)
        each = math.prod(moved.shape[1:])
        flat = moved.reshape(-1).repeat(self.size)
        got = self.all_to_all(flat, [moved.numel()] * self.size, [n * each for n in lengths])
        return got.view(sum(lengths), *moved.shape[1:]).movedim(0, dim).contiguous()

    def _spread(self, counts: Sequence[int]) -> list[int]:
        by_rank = dict(zip(self.ranks, counts, strict=True))
        return [by_rank.get(rank, 0) for rank in range(self._whole.size)]


class Team:
    """A group under a layout. Raises `LayoutRefused` where their sizes differ."""

    def __init__(self, group: Communicator, layout: GroupLayout) -> None:
        if layout.degree != group.size:
            raise LayoutRefused("layout", layout, f"a product of {group.size}, the group's size")
        self.group, self.layout = group, layout
        self.half, within = divmod(group.rank, layout.sequence)
        self._link, self._place = divmod(within, layout.ulysses)

        first, end = self.half * layout.sequence, (self.half + 1) * layout.sequence
        self.sequence_ranks = range(first, end)
        place = first + self._link * layout.ulysses
        self.ulysses_ranks = range(place, place + layout.ulysses)
        self.ring_ranks = range(first + self._place, end, layout.ulysses)

    def sequence(self) -> Communicator:
        """The members among whom this one's sequence is split."""
        return self._part(self.sequence_ranks)

    def ulysses(self) -> Communicator:
        """Those that exchange heads for tokens with this member."""
        return self._part(self.ulysses_ranks)

    def ring(self) -> Communicator:
        """Those around which this member's keys and values travel."""
        return self._part(self.ring_ranks)

    def halves(self) -> Communicator:
        """This member and its like in the other half."""
        like = self.group.rank % self.layout.sequence
        return self._part(range(like, self.group.size, self.layout.sequence))

    def _part(self, ranks: range) -> Communicator:
        return self.group if len(ranks) == self.group.size else SubCommunicator(self.group, ranks)
