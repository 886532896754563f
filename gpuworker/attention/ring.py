"""Ring attention (arXiv:2310.01889), alone or around Ulysses (USP, arXiv:2405.07719).

Each member attends its own queries to the keys and values of one link after the other; they travel
around the ring. Partial results are merged by their log-sum-exp, in float32, which is exact up to
rounding whatever the order. Lengths may differ from link to link; a link may have no token at all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpuworker.collectives.team import Communicator, Lengths

_HALVES = (torch.float16, torch.bfloat16)


class RingRefused(Exception):
    """An attention that cannot go around a ring. Field: `what`."""

    def __init__(self, what: str) -> None:
        super().__init__(f"ring attention: {what}")
        self.what = what


def ring_attention(
    ring: Communicator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Lengths,
    others: dict[str, Any],
) -> Tensor:
    """[B, tokens here, H, D] each -> [B, tokens here, H, D]; `lengths` are the links' tokens.

    `mask` is of this link's keys: [B, keys] or [B, 1 or H, 1, keys], boolean or added. Raises
    `RingRefused` for dropout, causality or grouped queries.
    """
    for name, harmless in (("dropout_p", 0.0), ("is_causal", False), ("enable_gqa", False)):
        if others.get(name, harmless) not in (harmless, None):
            raise RingRefused(f"{name}={others[name]}")
    scale = others.get("scale") or 1.0 / math.sqrt(query.shape[-1])
    q = query.transpose(1, 2)
    block = _Block(key, value, mask)
    total: Tensor | None = None
    weight: Tensor | None = None
    for passed in range(ring.size):
        length = lengths[(ring.rank - passed) % ring.size]
        if length:
            out, lse = _attend(q, block, scale)
            total, weight = (out, lse) if total is None else _merge(total, weight, out, lse)
        if passed + 1 < ring.size:
            coming = lengths[(ring.rank - passed - 1) % ring.size]
            block = block.passed_on(ring, coming)
    assert total is not None, "a sequence has at least one token"
    return total.to(query.dtype).transpose(1, 2)


class _Block:
    """Keys and values of one link, and their mask."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        self.key, self.value, self.mask = key, value, mask

    def passed_on(self, ring: Communicator, coming: int) -> _Block:
        """The previous link's block, for which this one goes to the next link."""
        parts = [self.key, self.value]
        if self.mask is not None:
            parts.append(self.mask.movedim(-1, 1).to(self.key.dtype))
        flat = torch.cat([part.reshape(-1) for part in parts])
        shapes = [(part.shape[0], coming, *part.shape[2:]) for part in parts]
        sizes = [math.prod(shape) for shape in shapes]
        send, receive = [0] * ring.size, [0] * ring.size
        send[(ring.rank + 1) % ring.size] = len(flat)
        receive[(ring.rank - 1) % ring.size] = sum(sizes)
        got = torch.split(ring.all_to_all(flat, send, receive), sizes)
        key, value, *rest = (g.view(shape) for g, shape in zip(got, shapes, strict=True))
        mask = None
        if self.mask is not None:
            mask = rest[0].movedim(1, -1).to(self.mask.dtype)
        return _Block(key, value, mask)


def _attend(q: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over one block: result [B, H, Nq, D] and log-sum-exp [B, H, Nq], in float32.

    torch's fused kernels where they tell the log-sum-exp; they do not for keys all of which are
    masked, so that a mask takes the way that is written out.
    """
    k, v = block.key.transpose(1, 2), block.value.transpose(1, 2)
    if block.mask is None and q.device.type == "cpu":
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, 0.0, False, scale=scale)
        return out.float(), lse.float()
    if block.mask is None and q.device.type == "cuda" and q.dtype in _HALVES:
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = fused(q, k, v, 0.0, False, False, scale=scale)
        return out.float(), lse.float()
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if block.mask is not None:
        mask = block.mask[:, None, None] if block.mask.ndim == 2 else block.mask
        shown = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if shown else scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return weights @ v.float(), lse


def _merge(total: Tensor, weight: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results as one."""
    assert weight is not None
    both = torch.logaddexp(weight, lse)
    known = torch.where(both.isinf(), 0.0, both)
    a, b = torch.exp(weight - known)[..., None], torch.exp(lse - known)[..., None]
    return total * a + out * b, both
