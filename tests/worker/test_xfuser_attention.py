"""xfuser's USP as the exchange: equal to whole attention in every layout, and to the stock picture;
what it cannot do goes the native way; what is missing is said.
"""

from __future__ import annotations

import pytest
import torch

from gpuworker.attention.exchange import AttentionInputs
from gpuworker.attention.xfuser_usp import XfuserAttention, XfuserMissing, chosen_attention
from gpuworker.collectives.team import GroupLayout
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, meet
from tests.worker.worker_pool import CPU, Pool
from tests.worker.xfuser_on_cpu import INSTALLED, attention_errors, denoised, load_on_cpu

needs_xfuser = pytest.mark.skipif(
    not INSTALLED, reason="xfuser is in the extra `cuda` only: it is made for accelerators (ADR 3)"
)
LAYOUTS = [
    GroupLayout(1, 2, 1),
    GroupLayout(1, 1, 2),
    GroupLayout(1, 4, 1),
    GroupLayout(1, 1, 4),
    GroupLayout(1, 2, 2),
]


@needs_xfuser
@pytest.mark.parametrize("layout", [*LAYOUTS, GroupLayout(2, 2, 1), GroupLayout(2, 1, 2)], ids=str)
def test_split_attention_is_whole_attention(pool: Pool, layout: GroupLayout) -> None:
    members = pool.names[: layout.degree]
    lengths = (5,) * layout.sequence
    found = pool.each(members, attention_errors, meet(pool, members), layout, lengths)
    assert max(error for error, _ in found) < 1e-5
    assert [asked for _, asked in found] == [1] * layout.degree


@needs_xfuser
@pytest.mark.parametrize("layout", [GroupLayout(1, 2, 1), GroupLayout(1, 2, 2)], ids=str)
def test_uneven_lengths_go_the_native_way(pool: Pool, layout: GroupLayout) -> None:
    members = pool.names[: layout.degree]
    lengths = tuple(3 - (rank > 0) for rank in range(layout.degree))
    found = pool.each(members, attention_errors, meet(pool, members), layout, lengths)
    assert max(error for error, _ in found) < 1e-5
    assert [asked for _, asked in found] == [0] * layout.degree


@needs_xfuser
def test_the_picture_is_the_stock_one_while_layouts_change(pool: Pool, wan: Reference) -> None:
    pairs = [(pool.names[:2], GroupLayout(1, 2, 1)), (pool.names[:2], GroupLayout(1, 1, 2))]
    legs = [(meet(pool, names), layout) for names, layout in pairs * 2]
    found = pool.each(pool.names[:2], denoised, wan.folder, wan.settings, legs)
    for latents in found:
        assert float((latents - wan.latents).abs().max()) < LATENT_TOLERANCE


@needs_xfuser
def test_the_probe_sees_a_kernel_that_is_off() -> None:
    adapter = load_on_cpu()
    adapter.probe(CPU)
    adapter._backend = "none of its own"
    with pytest.raises(XfuserMissing, match="kernel fails"):
        adapter.probe(CPU)


def test_on_a_cpu_auto_is_native_and_xfuser_is_refused() -> None:
    assert chosen_attention("auto", CPU) is None
    assert chosen_attention("native", torch.device("cuda", 0)) is None
    with pytest.raises(XfuserMissing, match="attention=xfuser: it needs a CUDA device"):
        chosen_attention("xfuser", CPU)


def test_what_xfuser_cannot_do_is_known_beforehand() -> None:
    tokens = torch.ones(1, 2, 4, 8)
    even = AttentionInputs(tokens, tokens, tokens, None, (2, 2))
    takes = XfuserAttention.takes
    assert takes(even, {}) and takes(even, {"scale": 8**-0.5, "dropout_p": 0.0, "is_causal": False})
    assert not takes(even._replace(lengths=(2, 1)), {})
    assert not takes(even._replace(mask=torch.ones(1, 2)), {})
    assert not takes(even, {"scale": 1.0})
    assert not takes(even, {"is_causal": True})
    assert not takes(even._replace(key=torch.ones(1, 2, 2, 8)), {})
