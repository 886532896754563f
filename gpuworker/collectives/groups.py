"""Groups on demand: communicators that only their members make, named by (epoch, ordered members).

There is no world and no default process group. The members of a group meet in the first member's
store (rendezvous.py) under the group's name; mesh/group_cache.py makes and keeps them. Rules:

- A name is used once: a member that still has a group must never meet another that makes it anew.
  After a loss or an eviction control raises the epoch.
- Caches evict each by itself, so that one member may still have what another has not. Who has given
  a group up leaves a mark in the first member's store, and then closes it: its peers fail at once,
  look for the mark, and all of them say `GroupSpent`, which is nobody's fault.
- What forming leaves in the first member's store is deleted as soon as all members have a step of
  that group behind them, or the group goes.
- Every wait has an end. Forming runs on a thread that the caller can leave, because a connect to a
  stopped host cannot be interrupted and gloo's constructor neither; collectives have a time-out.
- gloo closes its sockets when its last reference goes, and peers then fail within milliseconds:
  `abort()` relies on it. A call that is blocked in another thread still ends by its own time-out.
- An evicted group lives on until `acknowledge()`: closing at once can reset a slower peer.

On CUDA a group is an NCCL communicator for tensors and a gloo one for words; on CPU gloo is both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from gpuworker.collectives.own_time import Waited
from gpuworker.collectives.rendezvous import Abandoned, run_bounded
from hocket.clock import SystemClock

DEFAULT_TIMEOUT_S = 30.0
_LENGTH_BYTES = 8
_HEAD_BYTES = 64 << 10  # the length and as much of a blob go first
_SETTLE_POLL_S = 0.0002
_PAUSE = threading.Event()  # never set: waiting for it gives the interpreter to others
_CLOCK = SystemClock()
Members = tuple[str, ...]


class GroupLost(Exception):
    """A group that cannot be made or no longer works; only a higher epoch helps.

    Fields: `members`, `epoch`, `cause`, `suspects` (members that seem at fault; empty: unknown).
    """

    def __init__(self, members: Members, epoch: int, cause: str, suspects: Members = ()) -> None:
        cause = cause.split("\n", 1)[0]
        super().__init__(f"group {'/'.join(members)} epoch {epoch}: {cause}")
        self.members, self.epoch, self.cause, self.suspects = members, epoch, cause, suspects


class GroupSpent(GroupLost):
    """Nobody failed: `spent` members have given up the group of this name (evicted it)."""

    def __init__(self, members: Members, epoch: int, cause: str, spent: Members) -> None:
        super().__init__(members, epoch, cause)
        self.spent = spent


class BlobWithheld(Exception):
    """The source of a blob has none to hand out; every member is told, and the group stands.

    Fields: `excuse`, the source's words.
    """

    def __init__(self, excuse: bytes) -> None:
        super().__init__(repr(excuse[:80]))
        self.excuse = excuse


class Group:
    """The communicator of an ordered worker list. One thread uses it; `abort` may come from any.

    Every collective raises `GroupLost` when a peer died or did not come within `timeout_s`.
    """

    def __init__(
        self,
        epoch: int,
        members: Members,
        rank: int,
        device: torch.device,
        channels: Any = None,
        meet: Callable[[str, int, int], Any] | None = None,
        address: str = "",
    ) -> None:
        self.epoch, self.members = epoch, members
        self.address = address  # of the store where it was made
        self.rank, self.size, self.device = rank, len(members), device
        self.timeout_s = DEFAULT_TIMEOUT_S
        self._channels: tuple[Any, Any] | None = channels  # of device and host
        self._meet = meet  # makes a further channel of the device
        self._parts: dict[tuple[int, ...], Any] = {}
        self._waited: Waited | None = None  # of the step that is being made
        self._lost: str | None = None
        self.has_met = False  # every member has been heard: all of them are through with forming

    @property
    def lost(self) -> bool:
        """Whether the group has failed or was aborted."""
        return self._lost is not None

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Sends `send[r]` elements of the 1-D `flat` to member r; returns what all sent here."""
        assert flat.dim() == 1 and sum(send) == len(flat), (flat.shape, send)
        if self.size == 1:
            return flat
        out = flat.new_empty(sum(receive))
        counts = (list(receive), list(send))
        self._run(flat, lambda pg, end: pg.alltoall_base(out, flat, *counts, timeout=end))
        self.has_met = self.has_met or flat.device.type == "cpu"  # elsewhere it is under way
        return out

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """Joins the members' shards along `dim`, where they are `lengths` long (may be uneven)."""
        assert shard.shape[dim] == lengths[self.rank], (shard.shape, dim, lengths)
        if self.size == 1:
            return shard
        moved, longest = shard.movedim(dim, 0), max(lengths)
        padded = moved.new_zeros(longest, *moved.shape[1:])
        padded[: lengths[self.rank]] = moved
        out = padded.new_empty(self.size * longest, *padded.shape[1:])
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        self._run(shard, lambda pg, _: pg._allgather_base(out, padded, options))
        self.has_met = self.has_met or shard.device.type == "cpu"
        rows = [out[rank * longest :][:length] for rank, length in enumerate(lengths)]
        return torch.cat(rows).movedim(0, dim).contiguous()

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Fills `tensor` (contiguous, the same shape everywhere) from member `src`; returns it."""
        assert tensor.is_contiguous()
        if self.size > 1:
            self._run(tensor, lambda pg, end: pg.broadcast(tensor, src, timeout=end))
        return tensor

    def broadcast_word(self, value: int | None, src: int = 0) -> int:
        """Settles one 64-bit control word: every member returns what `src` passed."""
        assert value is not None or self.rank != src, "the source settles the word"
        return int(self.broadcast(torch.tensor([value or 0], dtype=torch.int64), src))

    def share_words(self, *words: int) -> list[list[int]]:
        """Tells every member a few 64-bit words, as many from each; returns all, by rank.

        One exchange: half the time of gloo's own all-gather, which goes around by neighbours.
        """
        flat = torch.tensor(words * self.size, dtype=torch.int64)
        counts = [len(words)] * self.size
        return self.all_to_all(flat, counts, counts).view(self.size, -1).tolist()

    def watch(self) -> Waited:
        """Adds up what is spent in exchanges from now on, until `unwatch` or the next watch."""
        self._waited = Waited()
        return self._waited

    def unwatch(self) -> None:
        """The step is made: what comes until the next one is not its."""
        self._waited = None

    def broadcast_blob(
        self, blob: bytes | None, src: int = 0, *, excuse: bytes | None = None
    ) -> bytes:
        """Hands the bytes of `src` to every member; the others pass None. Small ones in one go.

        A source that has none passes an excuse (short); every member raises `BlobWithheld` then.
        """
        assert self.rank != src or (blob is None) != (excuse is None), "the source has the blob"
        head = bytearray(_HEAD_BYTES)
        if excuse is not None:
            excuse = excuse[: _HEAD_BYTES - _LENGTH_BYTES]
            head[:_LENGTH_BYTES] = (-1 - len(excuse)).to_bytes(_LENGTH_BYTES, "little", signed=True)
            head[_LENGTH_BYTES : _LENGTH_BYTES + len(excuse)] = excuse
        elif blob is not None:
            head[:_LENGTH_BYTES] = len(blob).to_bytes(_LENGTH_BYTES, "little", signed=True)
            head[_LENGTH_BYTES : _LENGTH_BYTES + len(blob)] = blob[: _HEAD_BYTES - _LENGTH_BYTES]
        self.broadcast(torch.frombuffer(head, dtype=torch.uint8), src)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little", signed=True)
        if length < 0:
            raise BlobWithheld(bytes(head[_LENGTH_BYTES : _LENGTH_BYTES - 1 - length]))
        began = bytes(head[_LENGTH_BYTES : _LENGTH_BYTES + length])
        if len(began) == length:
            return began
        rest = bytearray(length - len(began) if blob is None else blob[len(began) :])
        self.broadcast(torch.frombuffer(rest, dtype=torch.uint8), src)
        return began + bytes(rest)

    def channel(self, ranks: Sequence[int]) -> Any:
        """torch's own process group of some members, this one among them, for who wants one.

        Formed by all of them at its first use, and kept: that of all members is there already. What
        a step spends in it is not seen here, so of that step nobody knows what it waited.
        """
        if self._waited is not None:
            self._waited.unseen()
        key = tuple(ranks)
        channels, meet = self._channels, self._meet
        if channels is None or meet is None:
            raise GroupLost(self.members, self.epoch, self._lost or "closed")
        if len(key) == self.size:
            return channels[0]
        if key not in self._parts:
            name, rank = "part/" + "/".join(map(str, key)), key.index(self.rank)
            try:
                self._parts[key] = run_bounded(lambda _: meet(name, rank, len(key)), self.timeout_s)
            except (RuntimeError, Abandoned) as error:
                raise self.lose(error) from error
        return self._parts[key]

    def settle(self, event: Any) -> None:
        """Waits until the device has come by `event`, a CUDA event of this step.

        NCCL's own waits have no end: here a hung peer is found, after `timeout_s`.
        """
        try:
            end_us = _CLOCK.now_us() + int(self.timeout_s * 1e6)
            while not event.query():
                if _CLOCK.now_us() >= end_us:
                    raise Abandoned("time-out")
                _PAUSE.wait(_SETTLE_POLL_S)
        except (RuntimeError, Abandoned) as error:
            raise self.lose(error) from error

    def abort(self, cause: str = "aborted") -> None:
        """Gives the group up, from any thread, as often as one likes; peers fail soon after."""
        self._lost = self._lost or cause
        channels, self._channels = self._channels, None
        parts, self._parts = self._parts, {}
        if channels is not None and channels[0] is not channels[1]:
            for channel in (channels[0], *parts.values()):
                channel.abort()  # stops kernels that spin on a dead peer

    def _run(self, tensor: Tensor, collective: Callable[[Any, timedelta], Any]) -> None:
        """Runs one collective where `tensor` lives; when it fails, the group is given up."""
        channels, waited = self._channels, self._waited
        if channels is None:
            raise GroupLost(self.members, self.epoch, self._lost or "closed")
        if waited is not None:
            waited.begin(tensor.device)
        try:
            channel = channels[tensor.device.type == "cpu"]
            collective(channel, timedelta(seconds=self.timeout_s)).wait()
        except RuntimeError as error:
            clear_frames(error.__traceback__)  # no reference may keep the sockets open
            del channel, channels
            raise self.lose(error) from error
        if waited is not None:
            waited.end(tensor.device)

    def lose(self, error: Exception) -> GroupLost:
        """Gives the group up for an error of its channels; what to raise then."""
        self.abort(str(error))
        return GroupLost(self.members, self.epoch, self._lost or "")
