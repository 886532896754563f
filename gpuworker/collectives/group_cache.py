"""A worker's groups: made on demand, kept as long as there is room, never made twice under a name.

See groups.py for the rules. What stands in the first member's store:

    group/<members>/<epoch>/…   what forming needs; deleted once a step of it has ended, or it goes
    spent/<members>             "<epoch> <worker>": who gave the group up last
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from gpuworker.collectives.channels import cuda_channel, host_channel
from gpuworker.collectives.groups import Group, GroupLost, GroupSpent, Members
from gpuworker.collectives.rendezvous import (
    Abandoned,
    Cancel,
    Rendezvous,
    run_bounded,
    wait_until,
)

log = logging.getLogger(__name__)

_SPENT_MAX = 4096  # member lists whose last epoch is remembered
_MARK_S = 1.0  # for leaving or reading a mark in another worker's store


class GroupCache:
    """This worker's groups; beyond `capacity` the least recently used one is evicted.

    `get`, `acknowledge`, `spent_by` and `close` belong to the compute thread; `abort` and `names`
    to any.
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
        self._fresh: list[Group] = []  # whose keys still stand in our store
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
        within `timeout_s` or `cancel` was set; `GroupSpent`: the name was used up here or there.
        """
        names = tuple(members)
        assert self._me in names and len(set(names)) == len(names), names
        if len(names) == 1:
            return Group(epoch, names, 0, self._device)
        try:
            cached = self._cached(epoch, names)
        except GroupSpent:
            self._mark(epoch, names, address)
            self._close_evicted(names)  # its peers, who wait in it, look for the mark
            raise
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
        """To be called when a step has ended on every member: lets evicted groups go, and what
        forming has left in this worker's store.
        """
        if not self._evicted and not self._fresh:
            return
        with self._lock:
            evicted, self._evicted = self._evicted, []
        for group in [group for group in self._fresh if group.has_met]:
            self._fresh.remove(group)
            self._clean(group.epoch, group.members)
        for group in evicted:
            self._mark(group.epoch, group.members, group.address)
            self._let_go(group, "evicted")

    def spent_by(self, group: Group) -> Members:
        """Who has given up a group that failed; nobody: it was lost by another cause."""

        def read(_: threading.Event) -> str:
            store, key = self._rendezvous.client(group.address), _mark_key(group.members)
            return store.get(key).decode() if store.check([key]) else ""

        try:
            epoch, _, worker = run_bounded(read, _MARK_S).partition(" ")
        except (RuntimeError, OSError, Abandoned):
            self._rendezvous.forget(group.address)
            return ()
        return (worker,) if worker and int(epoch) >= group.epoch else ()

    def abort(self) -> None:
        """Gives all groups up; each is lost from here on."""
        with self._lock:
            for group in (*self._groups.values(), *self._evicted):
                group.abort()

    def close(self) -> None:
        """The end: gives all groups up."""
        self.abort()

    def _cached(self, epoch: int, members: Members) -> Group | None:
        """The working group of this very name; None when it may be formed. Raises `GroupSpent`."""
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
                cause = f"epoch {last} was in use here; raise it"
                raise GroupSpent(members, epoch, cause, (self._me,))
            self._groups.pop(members, None)
        if group is not None:
            self._let_go(group, f"replaced by epoch {epoch}")
        return None

    def _form(
        self, epoch: int, members: Members, address: str, timeout_s: float, cancel: Cancel | None
    ) -> Group:
        rank = members.index(self._me)
        suspects = {members[0]} if rank else set()  # until its store has answered

        def work(abandoned: threading.Event) -> Group:
            base = self._rendezvous.client(address)
            store = PrefixStore(_prefix(epoch, members).rstrip("/"), base)
            _refuse_spent(base, epoch, members)
            store.set(f"here/{rank}", "")
            suspects.update(set(members) - {self._me})
            for peer, name in enumerate(members):
                wait_until(partial(_came, store, base, peer, epoch, members), abandoned)
                suspects.discard(name)
            timeout = timedelta(seconds=timeout_s)
            host = host_channel(store, rank, len(members), timeout, self._gloo)
            meet = partial(self._device_channel, store, timeout)
            cuda = self._device.type == "cuda"
            device = meet("", rank, len(members)) if cuda else host
            return Group(epoch, members, rank, self._device, (device, host), meet, address)

        try:
            group = run_bounded(work, timeout_s, cancel)
        except GroupSpent:
            self._clean(epoch, members)
            raise
        except (RuntimeError, OSError, Abandoned) as error:
            self._rendezvous.forget(address)
            self._clean(epoch, members)
            blamed = () if str(error) == "cancelled" else tuple(sorted(suspects))
            raise GroupLost(members, epoch, f"not formed: {error}", blamed) from error
        if not rank:
            self._fresh.append(group)
        return group

    def _device_channel(
        self, store: Any, timeout: timedelta, name: str, rank: int, size: int
    ) -> Any:
        """A channel for tensors on this worker's device, of all members or of some (`name`)."""
        store = PrefixStore(name, store) if name else store
        if self._device.type == "cuda":
            return cuda_channel(store, rank, size, timeout, self._device)
        return host_channel(store, rank, size, timeout, self._gloo)

    def _mark(self, epoch: int, members: Members, address: str) -> None:
        """Says in the first member's store that this worker has given the group up."""

        def write(_: threading.Event) -> None:
            store, key = self._rendezvous.client(address), _mark_key(members)
            store.set(key, f"{epoch} {self._me}")

        try:
            run_bounded(write, _MARK_S)
        except (RuntimeError, OSError, Abandoned) as error:  # then they see a group that is lost
            self._rendezvous.forget(address)
            log.warning("no mark of the group %s at %s: %s", "/".join(members), address, error)

    def _close_evicted(self, members: Members) -> None:
        with self._lock:
            closing = [group for group in self._evicted if group.members == members]
            self._evicted = [group for group in self._evicted if group.members != members]
        for group in closing:
            self._let_go(group, "evicted")

    def _let_go(self, group: Group, cause: str) -> None:
        group.abort(cause)
        if group in self._fresh:
            self._fresh.remove(group)
        self._clean(group.epoch, group.members)

    def _clean(self, epoch: int, members: Members) -> None:
        """Forming leaves kilobytes in the store of the first member."""
        if members[0] == self._me:
            self._rendezvous.drop_all(_prefix(epoch, members))


def _came(store: Any, base: Any, peer: int, epoch: int, members: Members) -> bool:
    """Whether a member is there; raises `GroupSpent` where one has said that it will not come."""
    _refuse_spent(base, epoch, members)
    return bool(store.check([f"here/{peer}"]))


def _refuse_spent(base: Any, epoch: int, members: Members) -> None:
    key = _mark_key(members)
    if base.check([key]):
        last, _, worker = base.get(key).decode().partition(" ")
        if int(last) >= epoch:
            raise GroupSpent(members, epoch, f"{worker} has given it up", (worker,))


def _prefix(epoch: int, members: Members) -> str:
    return f"group/{','.join(members)}/{epoch}/"


def _mark_key(members: Members) -> str:
    return f"spent/{','.join(members)}"
