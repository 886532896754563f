"""The real xfuser on a machine without a GPU, for tests of the adapter.

xfuser refuses to import without an accelerator. What it misses there stands in, and only that: the
version of CUDA while it loads, a Triton kernel of another attention, yunchang's holder of groups
(which it binds only where CUDA is), and a kernel that runs on a CPU. Its exchange and its ring are
its own.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpuworker.attention.exchange import AttentionInputs
from gpuworker.attention.xfuser_usp import XfuserAttention
from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.loading import load_card
from tests.worker.worker_pool import CPU, Member
from tests.worker.worker_tasks import Meeting

INSTALLED = all(importlib.util.find_spec(name) for name in ("xfuser", "yunchang"))
KERNEL = "cpu"


def load_on_cpu() -> XfuserAttention:
    """The adapter over the real package."""
    sparse = ModuleType("xfuser.core.sparge_attention.block_mask")
    sparse.get_block_map_meansim = None  # type: ignore[attr-defined]
    sys.modules.setdefault(sparse.__name__, sparse)
    before, torch.version.cuda = torch.version.cuda, "13.0"
    try:
        adapter = XfuserAttention(KERNEL)
    finally:
        torch.version.cuda = before
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY
    from yunchang.globals import PROCESS_GROUP

    adapter._layer.PROCESS_GROUP = PROCESS_GROUP
    ATTENTION_FUNCTION_REGISTRY[KERNEL] = _kernel
    return adapter


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, attention_kwargs: Any = None, **others: Any
) -> tuple[Tensor, Tensor]:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = fused(query, key, value, others["dropout_p"], bool(others["is_causal"]))
    return out, lse


def attention_errors(
    member: Member, meeting: Meeting, layout: GroupLayout, lengths: tuple[int, ...]
) -> tuple[float, int]:
    """How far split attention is from whole attention, and how often xfuser was asked."""
    adapter, asked = load_on_cpu(), []
    call = adapter._layer.USP

    def counted(*given: Any, **named: Any) -> Any:
        asked.append(1)
        return call(*given, **named)

    adapter._layer.USP = counted
    try:
        group = meeting.join(member)
        team = Team(group, layout)
        whole = torch.randn(3, 2, sum(lengths), 8, 16, generator=torch.Generator().manual_seed(4))
        place = team.sequence_ranks.index(group.rank)
        start, here = sum(lengths[:place]), lengths[place]
        q, k, v = whole.narrow(2, start, here).unbind()
        inputs = AttentionInputs(q, k, v, None, lengths)
        split = adapter(team, _local, inputs, {})
        expected = _local(*whole.unbind(), None).narrow(1, start, here)
        return float((split - expected).abs().max()), len(asked)
    finally:
        adapter._layer.USP = call


def _local(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2)


def denoised(member: Member, folder: str, settings: dict[str, Any], legs: Any) -> Tensor:
    """Latents behind steps under changing layouts, with xfuser around attention."""
    card = load_card(folder, CPU, torch.float32)  # of its own: the member's stays native
    card.attend_by(load_on_cpu())
    state = card.encode(**settings)
    for meeting, layout in legs:
        team = Team(meeting.join(member), layout)
        for _ in range(2):
            (state,) = card.step([state], team)
    return state.tensors["latents"]
