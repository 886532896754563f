"""Attention over token streams that are split over a team: Ulysses, a ring, or both.

  tokens of this member                 all tokens, some heads
q,k,v [B, n/P, H, D] ──all-to-all──▶ [B, n, H/P, D] ──attention, all-to-all──▶ [B, n/P, H, D]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from gpuworker.attention.ring import ring_attention
from gpuworker.collectives.team import Communicator, Lengths, Team

LocalAttention = Callable[..., Tensor]


class AttentionInputs(NamedTuple):
    """Arguments of one attention: query, key, value [B, tokens here, H, D], mask, token split."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    lengths: Lengths


# The seam for another context-parallel attention. It takes the team, the attention function that
# diffusers would have called, the inputs, and that function's other arguments; it returns
# [B, tokens here, H, D].
ParallelAttention = Callable[[Team, LocalAttention, AttentionInputs, dict[str, Any]], Tensor]


class DiffusersMoved(Exception):
    """An internal of diffusers that this layer needs is not where it was. Fields: what, version."""

    def __init__(self, what: str) -> None:
        self.what, self.version = what, str(diffusers.__version__)
        super().__init__(f"diffusers {self.version}: {what}")


def usp(
    team: Team, local: LocalAttention, inputs: AttentionInputs, others: dict[str, Any]
) -> Tensor:
    """Ulysses within each link of the ring. Without a ring, the local function sees it whole."""
    if team.layout.ring == 1:
        return ulysses(team.sequence(), local, inputs, others)
    ring, heads, each = team.ring(), team.ulysses(), team.layout.ulysses
    links = tuple(sum(inputs.lengths[i : i + each]) for i in range(0, len(inputs.lengths), each))
    first = ring.rank * each
    here = inputs.lengths[first : first + each]
    stacked = (inputs.query, inputs.key, inputs.value)
    query, key, value = _heads_for_tokens(heads, stacked, here) if each > 1 else stacked
    mask = inputs.mask
    if mask is not None:
        mask = _whole_mask(heads, mask, here, inputs.query.shape[2])
    out = ring_attention(ring, query, key, value, mask, links, others)
    return _tokens_for_heads(heads, out, here) if each > 1 else out


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
