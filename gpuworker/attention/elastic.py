"""Sequence parallelism whose degree and kind are arguments of a single step.

Installed once on a diffusers transformer. From then on

    with elastic.step(team):       # None, or one member a sequence: as diffusers wrote it
        transformer(...)

splits the token streams over the team's members, exchanges heads for tokens around every attention
(Ulysses, arXiv:2309.14509), lets keys and values travel (ring.py), or both, and gathers the result,
so that every member ends the step with the whole output. Between two steps nothing is kept: the
next step may name any other team, or none.

      tokens of this member                 all tokens, some heads
    q,k,v [B, n/P, H, D] ──all-to-all──▶ [B, n, H/P, D] ──attention, all-to-all──▶ [B, n/P, H, D]

Of diffusers' internals three are touched: `_cp_plan` (which tensors are split where; read as data),
the processors' `_parallel_config` (where we leave our mark), `_AttentionBackendRegistry._backends`
(whose functions we wrap). Models without a `_cp_plan` get a plan from their card; where their
processors call torch's own attention, it is met on the way (`OnTheWay`). When an upgrade moves
something, `DiffusersMoved` says what. Lengths may be uneven; a member may even get no token of a
stream.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from gpuworker.attention.exchange import (
    AttentionInputs,
    DiffusersMoved,
    LocalAttention,
    ParallelAttention,
    usp,
)
from gpuworker.attention.on_the_way import OnTheWay, Reach, watch_attention
from gpuworker.collectives.team import Communicator, Lengths, Team, split_lengths

DEGREE_MAX = 8
_STREAMS = ("hidden_states", "encoder_hidden_states")
_INSTALLED = "_hocket_elastic"  # where a transformer keeps its layer
_KEY_MASK = "attention_mask"  # in a plan: of all streams' keys, in the order of the plan's entries

Plan = Mapping[str, Any]  # as diffusers' _cp_plan


class DegreeRefused(Exception):
    """A degree that does not divide the model's attention heads. Fields: degree, heads, allowed."""

    def __init__(self, degree: int, heads: int, allowed: tuple[int, ...]) -> None:
        super().__init__(f"degree {degree} does not divide {heads} heads; allowed: {allowed}")
        self.degree, self.heads, self.allowed = degree, heads, allowed


class ElasticSP:
    """The layer, installed on one transformer. Not thread-safe: one step at a time a model.

    `joint` says that attention runs over all split streams at once (Flux, Qwen-Image); otherwise
    it runs over `hidden_states` alone (Wan). `plan` is for models without a `_cp_plan` of their
    own. Attention is met where processors ask diffusers' registry (those that have a
    `_parallel_config`), or else where they call torch; what an attention module is called with
    then says what it runs over. `cross` names the modules that attend to the text where a model's
    own plan splits it, although it is needed whole: it then stays whole, and cross-attention costs
    no exchange. Raises `DiffusersMoved`.
    """

    def __new__(
        cls,
        model: nn.Module,
        joint: bool,
        plan: Plan | None = None,
        attention: ParallelAttention | None = None,
        cross: str = "",
    ) -> ElasticSP:
        """The layer that the transformer has already, where several models share it."""
        installed = vars(model).get(_INSTALLED)
        return installed if isinstance(installed, cls) else super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        joint: bool,
        plan: Plan | None = None,
        attention: ParallelAttention | None = None,
        cross: str = "",
    ) -> None:
        if _INSTALLED in vars(model):
            return
        self._heads = head_count(model)
        self._joint = joint
        self._attention = attention or usp
        self._team: Team | None = None
        self._comm: Communicator | None = None  # of the members that share this one's sequence
        self._streams: dict[str, Lengths] = {}
        self._exchanges = 0
        self.compiled = False  # the model's blocks; where a sequence is split they run as written
        self._inside: Reach | None = None  # the attention module that is running
        self._meets_torch = not _leave_mark(model, self, cross)
        if not self._meets_torch:
            _wrap_registry()
        elif plan is None:
            raise DiffusersMoved(f"no processor of {type(model).__name__} has _parallel_config")
        else:
            watch_attention(model, self)
        _install_hooks(model, self, plan if plan is not None else _own_plan(model, bool(cross)))
        vars(model)[_INSTALLED] = self

    @contextmanager
    def step(self, team: Team | None) -> Iterator[None]:
        """Runs the forwards inside over `team`. Raises `DegreeRefused` before anything runs."""
        if team is not None and self._heads % team.layout.ulysses:
            raise DegreeRefused(team.layout.ulysses, self._heads, _divisors(self._heads))
        assert self._team is None, "a step is already running on this model"
        shared = team is not None and team.layout.sequence > 1
        self._team, self._comm = team, team.sequence() if team is not None and shared else None
        self._forget()
        try:
            with self._as_written(shared), self._meeting_torch(shared):
                yield
            if self._streams and not self._exchanges:  # split tokens never met: the result is wrong
                raise DiffusersMoved("attention did not come by here")
        finally:
            self._team = self._comm = None

    def _as_written(self, shared: bool) -> AbstractContextManager[Any]:
        """Exchanges are Python between two attentions: nothing for a compiler to see through."""
        eager = shared and self.compiled
        return torch.compiler.set_stance("force_eager") if eager else nullcontext()

    def _meeting_torch(self, shared: bool) -> AbstractContextManager[Any]:
        return OnTheWay(self) if shared and self._meets_torch else nullcontext()

    def _forget(self) -> None:
        self._streams, self._exchanges, self._inside = {}, 0, None

    @contextmanager
    def within(self, reach: Reach) -> Iterator[None]:
        """Attention inside is a module's, of which `reach` is known."""
        before, self._inside = self._inside, reach
        try:
            yield
        finally:
            self._inside = before

    def attend_by(self, attention: ParallelAttention) -> None:
        """Replaces what goes around attention from the next step on."""
        self._attention = attention

    @property
    def active(self) -> bool:
        """Whether a step over more than one member is running."""
        return self._comm is not None

    def split(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """This member's slice of `tensor` along `dim`."""
        assert self._comm is not None
        if name == _KEY_MASK:
            return self._split_mask(tensor, dim)
        lengths = split_lengths(tensor.shape[dim], self._comm.size)
        if name in _STREAMS:
            self._streams[name] = lengths
        start = sum(lengths[: self._comm.rank])
        return tensor.narrow(dim, start, lengths[self._comm.rank]).contiguous()

    def _split_mask(self, mask: Tensor, dim: int) -> Tensor:
        """Of the keys that this member has: its slice of each stream's part of the mask."""
        totals = [sum(lengths) for lengths in self._streams.values()]
        if mask.shape[dim] != sum(totals):
            raise DiffusersMoved(f"mask {tuple(mask.shape)} of streams with {totals} tokens")
        return torch.cat([self.split("", part, dim) for part in mask.split(totals, dim)], dim)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The whole of an output of which every member has its slice of `hidden_states`."""
        assert self._comm is not None
        lengths = self._streams["hidden_states"]
        if tensor.shape[dim] != lengths[self._comm.rank]:
            raise DiffusersMoved(f"output has {tensor.shape[dim]} tokens here, split was {lengths}")
        return self._comm.all_gather(tensor, dim, lengths)

    def attend(self, local: LocalAttention, arguments: dict[str, Any]) -> Tensor:
        """One attention call of the model, over the team of the running step."""
        if self._comm is None or self._team is None or not self._streams:
            return local(**arguments)
        query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
        mask = arguments.pop("attn_mask", None)
        lengths = self._attended_lengths()
        here = lengths[self._comm.rank]
        if query.shape[1] != here or key.shape[1] != here:
            found = f"{query.shape[1]} queries and {key.shape[1]} keys"
            raise DiffusersMoved(f"attention over {found} here, split was {lengths}")
        self._exchanges += 1
        inputs = AttentionInputs(query, key, value, mask, lengths)
        return self._attention(self._team, local, inputs, arguments)

    def met(
        self,
        attention: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """One call of torch's attention, [B, H, tokens here, D], that was met on the way."""
        if self._inside is Reach.ACROSS or not self._streams:
            out: Tensor = attention(query, key, value, attn_mask, **others)
            return out
        others["attn_mask"] = attn_mask

        def local(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **others: Any
        ) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            out: Tensor = attention(q, k, v, attn_mask=attn_mask, **others)
            return out.transpose(1, 2)

        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return self.attend(local, {"query": q, "key": k, "value": v, **others}).transpose(1, 2)

    def _attended_lengths(self) -> Lengths:
        if not self._joint or self._inside is Reach.OWN:
            return self._streams["hidden_states"]
        return tuple(map(sum, zip(*self._streams.values(), strict=True)))


def degrees(model: nn.Module) -> tuple[int, ...]:
    """The degrees up to 8 at which `model` can run: those that divide its attention heads."""
    return _divisors(head_count(model))


def head_count(model: nn.Module) -> int:
    """Attention heads of a diffusers transformer. Raises `DiffusersMoved`."""
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise DiffusersMoved(f"{type(model).__name__}.config has no num_attention_heads")
    return heads


def _divisors(heads: int) -> tuple[int, ...]:
    return tuple(degree for degree in range(1, DEGREE_MAX + 1) if heads % degree == 0)


class _Mark:
    """Stands where diffusers keeps its parallel configuration; leads attention back to us."""

    def __init__(self, layer: ElasticSP) -> None:
        self.layer = layer


def _leave_mark(model: nn.Module, layer: ElasticSP, cross: str) -> bool:
    """Whether there is a processor that takes it."""
    last = {name: name.rpartition(".")[2] for name, _ in model.named_modules()}
    if cross and cross not in last.values():
        raise DiffusersMoved(f"no module of {type(model).__name__} is called {cross!r}")
    processors = [
        getattr(module, "processor", None)
        for name, module in model.named_modules()
        if not cross or last[name] != cross
    ]
    marked = [p for p in processors if p is not None and hasattr(p, "_parallel_config")]
    for processor in marked:
        processor._parallel_config = _Mark(layer)
    return bool(marked)


def _wrap_registry() -> None:
    """Wraps every registered attention function, once a process."""
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    backends = getattr(registry, "_backends", None)
    if not backends:
        raise DiffusersMoved("_AttentionBackendRegistry._backends is gone")
    for name, function in backends.items():
        if not hasattr(function, "_hocket_wrapped"):
            backends[name] = _wrapped(function)


def _wrapped(function: LocalAttention) -> LocalAttention:
    @functools.wraps(function)
    def run(**arguments: Any) -> Tensor:
        mark = arguments.get("_parallel_config")
        if not isinstance(mark, _Mark):
            return function(**arguments)
        return mark.layer.attend(function, {**arguments, "_parallel_config": None})

    run._hocket_wrapped = True  # type: ignore[attr-defined]
    return run


def _own_plan(model: nn.Module, text_whole: bool) -> Plan:
    """The model's `_cp_plan`; without what it splits of the text, where that stays whole."""
    plan = getattr(model, "_cp_plan", None)
    if not plan:
        raise DiffusersMoved(f"{type(model).__name__} has no _cp_plan")
    if not text_whole:
        return plan
    return {
        name: {key: entry for key, entry in rule.items() if not str(key).startswith("encoder_")}
        if isinstance(rule, dict)
        else rule
        for name, rule in plan.items()
    }


def _each_named(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Any]]:
    """The plan's rules by module; a "*" stands for every index of a list of modules."""
    names = [name for name, _ in model.named_modules()]
    for pattern, rule in plan.items():
        parts = (r"\d+" if part == "*" else re.escape(part) for part in pattern.split("."))
        meant = re.compile(r"\.".join(parts))
        found = [name for name in names if meant.fullmatch(name)]
        if not found:
            raise DiffusersMoved(f"_cp_plan names {pattern!r}, which {type(model).__name__} lacks")
        yield from ((name, rule) for name in found)


def _install_hooks(model: nn.Module, layer: ElasticSP, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for name, rule in _each_named(model, plan):
        if not isinstance(rule, dict):
            modules[name].register_forward_hook(_gather_hook(layer, rule))
            continue
        if any(not hasattr(entry, "split_dim") for entry in rule.values()):
            raise DiffusersMoved(f"_cp_plan[{name!r}] has an entry of an unknown kind")
        of_input = {key: entry for key, entry in rule.items() if not entry.split_output}
        of_output = {key: entry for key, entry in rule.items() if entry.split_output}
        if of_input:
            hook = _split_inputs_hook(layer, modules[name], of_input)
            modules[name].register_forward_pre_hook(hook, with_kwargs=True)
        if of_output:
            modules[name].register_forward_hook(_split_outputs_hook(layer, of_output))


def _split_inputs_hook(
    layer: ElasticSP, module: nn.Module, rule: dict[str, Any]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
    if missing := [name for name in rule if name not in names]:
        raise DiffusersMoved(f"{type(module).__name__}.forward has no parameter {missing}")

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not layer.active:
            return args, kwargs
        by_place, given = list(args), dict(kwargs)
        for name, entry in rule.items():
            place = names.index(name)
            value = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(value, Tensor) and value.dim() == entry.expected_dims:
                value = layer.split(name, value, entry.split_dim)
            elif isinstance(value, tuple):  # a rotary embedding's cosines and sines
                value = tuple(layer.split(name, part, entry.split_dim) for part in value)
            if place < len(args):
                by_place[place] = value
            elif name in kwargs:
                given[name] = value
        return tuple(by_place), given

    return hook


def _split_outputs_hook(
    layer: ElasticSP, rule: dict[int, Any]
) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if not layer.active:
            return output
        parts = [output] if isinstance(output, Tensor) else list(output)
        for index, entry in rule.items():
            parts[index] = layer.split(f"output {index}", parts[index], entry.split_dim)
        return parts[0] if isinstance(output, Tensor) else tuple(parts)

    return hook


def _gather_hook(layer: ElasticSP, rule: Any) -> Callable[[nn.Module, Any, Any], Any]:
    if not hasattr(rule, "gather_dim"):
        raise DiffusersMoved("_cp_plan has an output rule of an unknown kind")

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return layer.gather(output, rule.gather_dim) if layer.active else output

    return hook
