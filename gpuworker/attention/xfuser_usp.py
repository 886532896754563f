"""xfuser's USP as the exchange around attention, where it is installed (extra `cuda`, ADR 3).

    our group, our split ─▶ q, k, v of this member ─▶ xfuser: USP(q, k, v) ─▶ output of this member

Sharding, groups and layouts stay ours; xfuser brings its exchange and its kernels. It keeps one
layout a process in module globals and expects a default process group, of which every rank makes
every subgroup. All of that is lent to it for one call at a time (`_World`): a group then looks like
a world, whatever the next step's layout is. It splits evenly and knows no mask: other calls go the
way of `exchange.usp`, by rules that all members apply alike.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import distributed_c10d as c10d

from gpuworker.attention.exchange import (
    AttentionInputs,
    LocalAttention,
    ParallelAttention,
    usp,
)
from gpuworker.collectives.groups import Group
from gpuworker.collectives.team import Team

log = logging.getLogger(__name__)

_HARMLESS = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
_HALVES = (torch.float16, torch.bfloat16)
_PROBE_TOLERANCE = 2e-2  # of bfloat16, on a scale of one


class XfuserMissing(Exception):
    """xfuser was asked for and cannot be used. Field: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"attention=xfuser: {reason}; allowed here: native")
        self.reason = reason


def chosen_attention(wanted: str, device: torch.device) -> ParallelAttention | None:
    """What goes around attention for a worker's setting; None: our own. Raises `XfuserMissing`."""
    if wanted == "native" or (wanted == "auto" and device.type != "cuda"):
        return None
    try:
        if device.type != "cuda":
            raise XfuserMissing("it needs a CUDA device")
        attention = XfuserAttention()
        attention.probe(device)
    except XfuserMissing as missing:
        if wanted == "xfuser":
            raise
        log.warning("%s: the native exchange is used", missing)
        return None
    return attention


class XfuserAttention:
    """A `ParallelAttention`. Raises `XfuserMissing` where xfuser does not load."""

    def __init__(self, backend: Any = None) -> None:
        """`backend` is one of xfuser's AttentionBackendType; None: what fits the device."""
        try:
            self._layer: Any = importlib.import_module("xfuser.model_executor.layers.usp")
            self._state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
            self._runtime: Any = importlib.import_module("xfuser.core.distributed.runtime_state")
            kinds: Any = importlib.import_module("xfuser.core.distributed.attention_backend")
            self._backend = backend or self._fitting(kinds.AttentionBackendType)
        except Exception as error:  # whatever its many parts raise where they find no accelerator
            raise XfuserMissing(f"{type(error).__name__}: {error}") from error

    def __call__(
        self, team: Team, local: LocalAttention, inputs: AttentionInputs, others: dict[str, Any]
    ) -> Tensor:
        if not self.takes(inputs, others) or not isinstance(team.group, Group):
            return usp(team, local, inputs, others)
        q, k, v = (t.transpose(1, 2) for t in inputs[:3])  # [B, H, tokens here, D]
        group = team.group
        view = _View.of(team)
        heads, links = (group.channel(r) if len(r) > 1 else None for r in (view.heads, view.links))
        try:
            with self._lent(group, view, heads, links):
                out: Tensor = self._layer.USP(q, k, v, combine_qkv_a2a=True, backend=self._backend)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or group.device.type == "cpu":  # gloo's own
                raise group.lose(error) from error
            raise
        return out.transpose(1, 2)

    @staticmethod
    def takes(inputs: AttentionInputs, others: dict[str, Any]) -> bool:
        """Whether xfuser can make this call: even lengths, no mask, the usual scale, 16 bits."""
        query = inputs.query
        usual = 1.0 / math.sqrt(query.shape[-1])
        return (
            inputs.mask is None
            and len(set(inputs.lengths)) == 1
            and inputs.key.shape == query.shape
            and math.isclose(others.get("scale") or usual, usual)
            and all(others.get(name) in (value, None) for name, value in _HARMLESS.items())
            and (query.device.type == "cpu" or query.dtype in _HALVES)
        )

    def probe(self, device: torch.device) -> None:
        """One call without a group equals torch's attention, or else `XfuserMissing`."""
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (3, 1, 4, 128, 64)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = torch.randn(shape, generator=generator).to(device, dtype).unbind()
        try:
            with torch.inference_mode(), self._seen(_View()):
                found = self._layer.USP(q, k, v, backend=self._backend)
        except Exception as error:
            raise XfuserMissing(f"its kernel fails: {type(error).__name__}: {error}") from error
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        apart = float((found.float() - expected.float()).abs().max())
        if not apart <= _PROBE_TOLERANCE:
            raise XfuserMissing(f"its {self._backend} is {apart:.3g} off")

    def _fitting(self, kinds: Any) -> Any:
        """The fastest kernel that tells the log-sum-exp, which a ring needs."""
        packages = self._runtime.env_info
        if packages.get("has_flash_attn_3"):
            return kinds.FLASH_3
        return kinds.FLASH if packages.get("has_flash_attn") else kinds.SDPA_FLASH

    @contextmanager
    def _lent(self, group: Group, view: _View, heads: Any, ring: Any) -> Iterator[None]:
        """The group as xfuser's world, with its groups in place of that process's."""
        processes = self._layer.PROCESS_GROUP
        before = (processes.ULYSSES_PG, processes.RING_PG)
        whole = group.channel(range(group.size))
        named = {heads: view.heads, ring: view.links}
        parts = {part: ranks for part, ranks in named.items() if part is not None}
        processes.ULYSSES_PG, processes.RING_PG = heads, ring
        try:
            with _world(whole, parts), self._seen(view):
                yield
        finally:
            processes.ULYSSES_PG, processes.RING_PG = before

    @contextmanager
    def _seen(self, view: _View) -> Iterator[None]:
        before = (self._state._SP, self._runtime._RUNTIME)
        self._state._SP, self._runtime._RUNTIME = view, _Settings(self._backend)
        try:
            yield
        finally:
            self._state._SP, self._runtime._RUNTIME = before


@dataclass(frozen=True)
class _View:
    """What xfuser asks of its sequence-parallel coordinator, and the ranks behind it."""

    world_size: int = 1
    rank_in_group: int = 0
    ulysses_world_size: int = 1
    ulysses_rank: int = 0
    ring_world_size: int = 1
    ring_rank: int = 0
    heads: tuple[int, ...] = ()
    links: tuple[int, ...] = ()

    @classmethod
    def of(cls, team: Team) -> _View:
        rank, heads, links = team.group.rank, team.ulysses_ranks, team.ring_ranks
        return cls(
            world_size=team.layout.sequence,
            rank_in_group=team.sequence_ranks.index(rank),
            ulysses_world_size=len(heads),
            ulysses_rank=heads.index(rank),
            ring_world_size=len(links),
            ring_rank=links.index(rank),
            heads=tuple(heads),
            links=tuple(links),
        )


class _Settings:
    """What xfuser asks of its runtime state."""

    fp8_comms = None
    runtime_config = SimpleNamespace(use_spargeattn_head_balance=False)

    def __init__(self, backend: Any) -> None:
        self.attention_backend = backend


@contextmanager
def _world(whole: Any, parts: dict[Any, tuple[int, ...]]) -> Iterator[None]:
    """torch.distributed's functions find `whole` as the default group, and the parts by name."""
    world, known = c10d._world, dict(c10d._world.pg_group_ranks)
    before, world.default_pg = world.default_pg, whole
    named: list[Any] = []
    for group, ranks in ({whole: tuple(range(whole.size()))} | parts).items():
        world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
        named.append(f"hocket/{id(group)}")
        group._set_group_name(named[-1])
        _register_process_group(named[-1], group)
    try:
        yield
    finally:
        for name in named:
            _unregister_process_group(name)
        world.default_pg = before
        world.pg_group_ranks.clear()
        world.pg_group_ranks.update(known)
