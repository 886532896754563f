"""Sequence parallelism whose degree is an argument of a single step.

Installed once on a diffusers transformer. From then on

    with elastic.step(group):      # None or a group of one: the model runs as diffusers wrote it
        transformer(...)

splits the token streams over the group's members, exchanges heads for tokens around every attention
(Ulysses, arXiv:2309.14509) and gathers the result, so that every member ends the step with the
whole output. Between two steps nothing is kept: the next step may name any other group, or none.

      tokens of this member                 all tokens, some heads
    q,k,v [B, n/P, H, D] ──all-to-all──▶ [B, n, H/P, D] ──attention, all-to-all──▶ [B, n/P, H, D]

Of diffusers' internals three are touched: `_cp_plan` (which tensors are split where; read as data),
the processors' `_parallel_config` (where we leave our mark), `_AttentionBackendRegistry._backends`
(whose functions we wrap). When an upgrade moves one of them, `DiffusersMoved` says which. Lengths
may be uneven; a member may even get no token of a stream.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import diffusers
import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

DEGREE_MAX = 8
_STREAMS = ("hidden_states", "encoder_hidden_states")

Lengths = tuple[int, ...]  # tokens of each member, in rank order
LocalAttention = Callable[..., Tensor]


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


class AttentionInputs(NamedTuple):
    """Arguments of one attention: query, key, value [B, tokens here, H, D], mask, token split."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    lengths: Lengths


# The seam for another context-parallel attention (USP of xfuser on CUDA). It takes the group, the
# attention function that diffusers would have called, the inputs, and that function's other
# arguments; it returns [B, tokens here, H, D].
ParallelAttention = Callable[
    [Communicator, LocalAttention, AttentionInputs, dict[str, Any]], Tensor
]


class DegreeRefused(Exception):
    """A degree that does not divide the model's attention heads. Fields: degree, heads, allowed."""

    def __init__(self, degree: int, heads: int, allowed: tuple[int, ...]) -> None:
        super().__init__(f"degree {degree} does not divide {heads} heads; allowed: {allowed}")
        self.degree, self.heads, self.allowed = degree, heads, allowed


class DiffusersMoved(Exception):
    """An internal of diffusers that this layer needs is not where it was. Fields: what, version."""

    def __init__(self, what: str) -> None:
        self.what, self.version = what, str(diffusers.__version__)
        super().__init__(f"diffusers {self.version}: {what}")


class ElasticSP:
    """The layer, installed on one transformer. Not thread-safe: one step at a time a model.

    `joint` says that attention runs over all split streams at once (Flux, Qwen-Image); otherwise
    it runs over `hidden_states` alone (Wan). Raises `DiffusersMoved`.
    """

    def __init__(
        self, model: nn.Module, joint: bool, attention: ParallelAttention | None = None
    ) -> None:
        self._heads = head_count(model)
        self._joint = joint
        self._attention = attention or ulysses
        self._comm: Communicator | None = None
        self._streams: dict[str, Lengths] = {}
        self._exchanges = 0
        _wrap_registry()
        _leave_mark(model, self)
        _install_hooks(model, self)

    @contextmanager
    def step(self, comm: Communicator | None) -> Iterator[None]:
        """Runs the forwards inside over `comm`. Raises `DegreeRefused` before anything runs."""
        if comm is not None and self._heads % comm.size:
            raise DegreeRefused(comm.size, self._heads, _divisors(self._heads))
        assert self._comm is None, "a step is already running on this model"
        self._comm = comm if comm is not None and comm.size > 1 else None
        self._streams, self._exchanges = {}, 0
        try:
            yield
            if self._streams and not self._exchanges:  # split tokens never met: the result is wrong
                raise DiffusersMoved("attention did not go through _AttentionBackendRegistry")
        finally:
            self._comm = None

    @property
    def active(self) -> bool:
        """Whether a step over more than one member is running."""
        return self._comm is not None

    def split(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """This member's slice of `tensor` along `dim`."""
        assert self._comm is not None
        lengths = split_lengths(tensor.shape[dim], self._comm.size)
        if name in _STREAMS:
            self._streams[name] = lengths
        start = sum(lengths[: self._comm.rank])
        return tensor.narrow(dim, start, lengths[self._comm.rank]).contiguous()

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The whole of an output of which every member has its slice of `hidden_states`."""
        assert self._comm is not None
        lengths = self._streams["hidden_states"]
        if tensor.shape[dim] != lengths[self._comm.rank]:
            raise DiffusersMoved(f"output has {tensor.shape[dim]} tokens here, split was {lengths}")
        return self._comm.all_gather(tensor, dim, lengths)

    def attend(self, local: LocalAttention, arguments: dict[str, Any]) -> Tensor:
        """One attention call of the model, over the group of the running step."""
        if self._comm is None:
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
        return self._attention(self._comm, local, inputs, arguments)

    def _attended_lengths(self) -> Lengths:
        if not self._joint:
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


def split_lengths(total: int, parts: int) -> Lengths:
    """`total` tokens over `parts` members, the first ones taking the rest (torch.tensor_split)."""
    each, rest = divmod(total, parts)
    return tuple(each + (rank < rest) for rank in range(parts))


def ulysses(
    comm: Communicator, local: LocalAttention, inputs: AttentionInputs, others: dict[str, Any]
) -> Tensor:
    """Heads for tokens, attention on whole sequences, tokens for heads. Two all-to-alls."""
    stacked = (inputs.query, inputs.key, inputs.value)
    query, key, value = _heads_for_tokens(comm, stacked, inputs.lengths)
    mask = None
    if inputs.mask is not None:
        mask = _whole_mask(comm, inputs.mask, inputs.lengths, inputs.query.shape[2])
    out = local(query=query, key=key, value=value, attn_mask=mask, **others)
    return _tokens_for_heads(comm, out, inputs.lengths)


def _heads_for_tokens(
    comm: Communicator, tensors: Sequence[Tensor], lengths: Lengths
) -> list[Tensor]:
    """[B, tokens here, H, D] each -> [B, all tokens, H/P, D] each, in one exchange."""
    pieces = [  # [P, B * tokens here * H/P * D]: row r goes to member r
        t.view(*t.shape[:2], comm.size, -1, t.shape[3])
        .permute(2, 0, 1, 3, 4)
        .reshape(comm.size, -1)
        for t in tensors
    ]
    row = sum(piece.shape[1] for piece in pieces)
    per_token = sum(_per_token(t, comm.size) for t in tensors)
    flat = torch.cat(pieces, dim=1).flatten()
    got = comm.all_to_all(flat, [row] * comm.size, [n * per_token for n in lengths])
    parts: list[list[Tensor]] = [[] for _ in tensors]
    for n, block in zip(lengths, torch.split(got, [n * per_token for n in lengths]), strict=True):
        sizes = [n * _per_token(t, comm.size) for t in tensors]
        for out, t, piece in zip(parts, tensors, torch.split(block, sizes), strict=True):
            out.append(piece.view(t.shape[0], n, t.shape[2] // comm.size, t.shape[3]))
    return [torch.cat(part, dim=1) for part in parts]


def _per_token(tensor: Tensor, parts: int) -> int:
    """Elements that one token of [B, n, H, D] sends to each member."""
    return tensor.shape[0] * (tensor.shape[2] // parts) * tensor.shape[3]


def _tokens_for_heads(comm: Communicator, out: Tensor, lengths: Lengths) -> Tensor:
    """[B, all tokens, H/P, D] -> [B, tokens here, H, D]."""
    batch, _, heads, width = out.shape
    flat = torch.cat([part.reshape(-1) for part in torch.split(out, list(lengths), dim=1)])
    here, per_token = lengths[comm.rank], batch * heads * width
    send, receive = [n * per_token for n in lengths], [here * per_token] * comm.size
    got = comm.all_to_all(flat, send, receive).view(comm.size, batch, here, heads, width)
    return got.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _whole_mask(comm: Communicator, mask: Tensor, lengths: Lengths, heads: int) -> Tensor:
    """A mask of keys for whole sequences and this member's heads.

    Shapes: [B, keys here] or [B, 1 or H, 1, keys here]. A mask with a row a query cannot be put
    together from what the members have: `DiffusersMoved`.
    """
    by_query = mask.ndim != 2 and (mask.ndim != 4 or mask.shape[2] != 1)
    if by_query or mask.shape[-1] != lengths[comm.rank]:
        raise DiffusersMoved(f"attention mask {tuple(mask.shape)} does not fit the split {lengths}")
    whole = comm.all_gather(mask, mask.ndim - 1, lengths)
    if mask.ndim == 4 and mask.shape[1] > 1:
        each = heads // comm.size
        whole = whole.narrow(1, comm.rank * each, each).contiguous()
    return whole


def _divisors(heads: int) -> tuple[int, ...]:
    return tuple(degree for degree in range(1, DEGREE_MAX + 1) if heads % degree == 0)


class _Mark:
    """Stands where diffusers keeps its parallel configuration; leads attention back to us."""

    def __init__(self, layer: ElasticSP) -> None:
        self.layer = layer


def _leave_mark(model: nn.Module, layer: ElasticSP) -> None:
    processors = [getattr(module, "processor", None) for module in model.modules()]
    marked = [p for p in processors if p is not None and hasattr(p, "_parallel_config")]
    if not marked:
        raise DiffusersMoved(f"no processor of {type(model).__name__} has _parallel_config")
    for processor in marked:
        processor._parallel_config = _Mark(layer)


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


def _install_hooks(model: nn.Module, layer: ElasticSP) -> None:
    plan = getattr(model, "_cp_plan", None)
    if not plan:
        raise DiffusersMoved(f"{type(model).__name__} has no _cp_plan")
    modules = dict(model.named_modules())
    for name, rule in plan.items():
        if name not in modules:
            raise DiffusersMoved(f"_cp_plan names {name!r}, which {type(model).__name__} lacks")
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
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, entry in rule.items():
            value = given.get(name)
            if isinstance(value, Tensor) and value.dim() == entry.expected_dims:
                given[name] = layer.split(name, value, entry.split_dim)
        return (), given

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
