"""Groups on demand: communicators that only their members make, named by (epoch, ordered members).

There is no world and no default process group. The members of a group meet in the first member's
store (rendezvous.py) under the group's name. House rules:

- A name is used once: old addresses stay in the store, and a member that still has a group must
  never meet another that makes it anew. After a loss or an eviction control raises the epoch.
- Every wait has an end. Forming runs on a thread that the caller can leave, because a connect to a
  stopped host cannot be interrupted and gloo's constructor neither; collectives have a time-out.
- gloo closes its sockets when its last reference goes, and peers then fail within milliseconds:
  `abort()` relies on it. A call that is blocked in another thread still ends by its own time-out.
- An evicted group lives on until `acknowledge()`: closing at once can reset a slower peer.

On CUDA a group is an NCCL communicator for tensors and a gloo one for words; on CPU gloo is both.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from traceback import clear_frames
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore

from gpuworker.channels import cuda_channel, host_channel
from gpuworker.own_time import Waited
from gpuworker.rendezvous import Abandoned, Cancel, Rendezvous, run_bounded, wait_until
from hocket.clock import SystemClock

DEFAULT_TIMEOUT_S = 30.0
_SPENT_MAX = 4096  # member lists whose last epoch is remembered
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
    ) -> None:
        self.epoch, self.members = epoch, members
        self.rank, self.size, self.device = rank, len(members), device
        self.timeout_s = DEFAULT_TIMEOUT_S
        self._channels: tuple[Any, Any] | None = channels  # of device and host
        self._meet = meet  # makes a further channel of the device
        self._parts: dict[tuple[int, ...], Any] = {}
        self._waited: Waited | None = None  # of the step that is being made
        self._lost: str | None = None

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

    def broadcast_blob(self, blob: bytes | None, src: int = 0) -> bytes:
        """Hands the bytes of `src` to every member; the others pass None. Small ones in one go."""
        assert blob is not None or self.rank != src, "the source has the blob"
        head = bytearray(_HEAD_BYTES)
        if blob is not None:
            head[:_LENGTH_BYTES] = len(blob).to_bytes(_LENGTH_BYTES, "little")
            head[_LENGTH_BYTES : _LENGTH_BYTES + len(blob)] = blob[: _HEAD_BYTES - _LENGTH_BYTES]
        self.broadcast(torch.frombuffer(head, dtype=torch.uint8), src)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
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


class GroupCache:
    """This worker's groups; beyond `capacity` the least recently used one is evicted.

    `get`, `acknowledge` and `close` belong to the compute thread; `abort` and `names` to any.
    """

    def __init__(
        self, rendezvous: Rendezvous, me: str, device: torch.device, capacity: int = 16
    ) -> None:
        self._rendezvous, self._me, self._device = rendezvous, me, device
        self._capacity = capacity
        self._lock = threading.Lock()
        self._groups: OrderedDict[Members, Group] = OrderedDict()
        self._spent: OrderedDict[Members, int] = OrderedDict()
        self._evicted: list[Group] = []
        self._gloo = dist.ProcessGroupGloo.create_device(hostname=rendezvous.host)

    def get(
        self,
        epoch: int,
        members: Sequence[str],
        address: str,
        timeout_s: float,
        cancel: Cancel | None = None,
    ) -> Group:
        """The group of `members` at `epoch`: cached, or formed now, which needs all to call.

        `address` is the rendezvous of the first member. Raises `GroupLost`: a member did not come
        within `timeout_s`, `cancel` was set, or the name was used up here.
        """
        names = tuple(members)
        assert self._me in names and len(set(names)) == len(names), names
        if len(names) == 1:
            return Group(epoch, names, 0, self._device)
        cached = self._cached(epoch, names)
        if cached is not None:
            return cached
        group = self._form(epoch, names, address, timeout_s, cancel)
        with self._lock:
            self._groups[names] = group
            if len(self._groups) > self._capacity:
                self._evicted.append(self._groups.popitem(last=False)[1])
        return group

    def names(self) -> tuple[tuple[int, Members], ...]:
        """(epoch, members) of the groups that work, least recently used first."""
        with self._lock:
            return tuple((g.epoch, g.members) for g in self._groups.values() if not g.lost)

    def acknowledge(self) -> None:
        """To be called when a step has ended on every member: lets evicted groups go."""
        with self._lock:
            while self._evicted:
                self._evicted.pop().abort("evicted")

    def abort(self) -> None:
        """Gives all groups up; each is lost from here on."""
        with self._lock:
            for group in (*self._groups.values(), *self._evicted):
                group.abort()

    def close(self) -> None:
        """The end: gives all groups up."""
        self.abort()

    def _cached(self, epoch: int, members: Members) -> Group | None:
        """The working group of this very name; None when it may be formed. Raises `GroupLost`."""
        with self._lock:
            group = self._groups.get(members)
            if group is not None and group.epoch == epoch and not group.lost:
                self._groups.move_to_end(members)
                return group
            last = self._spent.pop(members, -1)
            self._spent[members] = max(epoch, last)
            if len(self._spent) > _SPENT_MAX:
                self._spent.popitem(last=False)
            if epoch <= last:
                raise GroupLost(members, epoch, f"epoch {last} was in use here; raise it")
            self._groups.pop(members, None)
        if group is not None:
            group.abort(f"replaced by epoch {epoch}")
        return None

    def _form(
        self, epoch: int, members: Members, address: str, timeout_s: float, cancel: Cancel | None
    ) -> Group:
        rank = members.index(self._me)
        suspects = {members[0]} if rank else set()  # until its store has answered

        def work(abandoned: threading.Event) -> Group:
            store = PrefixStore(f"{epoch}/{'/'.join(members)}", self._rendezvous.client(address))
            store.set(f"here/{rank}", "")
            suspects.update(set(members) - {self._me})
            for peer, name in enumerate(members):
                wait_until(partial(store.check, [f"here/{peer}"]), abandoned)
                suspects.discard(name)
            timeout = timedelta(seconds=timeout_s)
            host = host_channel(store, rank, len(members), timeout, self._gloo)
            meet = partial(self._device_channel, store, timeout)
            cuda = self._device.type == "cuda"
            device = meet("", rank, len(members)) if cuda else host
            return Group(epoch, members, rank, self._device, (device, host), meet)

        try:
            return run_bounded(work, timeout_s, cancel)
        except (RuntimeError, OSError, Abandoned) as error:
            self._rendezvous.forget(address)
            blamed = () if str(error) == "cancelled" else tuple(sorted(suspects))
            raise GroupLost(members, epoch, f"not formed: {error}", blamed) from error

    def _device_channel(
        self, store: Any, timeout: timedelta, name: str, rank: int, size: int
    ) -> Any:
        """A channel for tensors on this worker's device, of all members or of some (`name`)."""
        store = PrefixStore(name, store) if name else store
        if self._device.type == "cuda":
            return cuda_channel(store, rank, size, timeout, self._device)
        return host_channel(store, rank, size, timeout, self._gloo)
