"""The elastic layer by itself: degrees, lengths, the upgrade guard for diffusers' internals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models import attention_dispatch
from torch import Tensor

from gpuworker.attention.elastic import DegreeRefused, ElasticSP, degrees
from gpuworker.attention.exchange import AttentionInputs, DiffusersMoved, ulysses
from gpuworker.collectives.team import GroupLayout, Team, split_lengths
from gpuworker.models import pixart, sd3
from tests.worker import worker_tasks as tasks
from tests.worker.worker_jobs import meet
from tests.worker.worker_pool import Pool


def small_flux(heads: int = 4) -> Any:
    """A Flux of one block of each kind."""
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def forward(model: Any) -> Tensor:
    """One forward on fixed inputs: 6 image and 3 text tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        output: Tensor = model(
            hidden_states=torch.randn(1, 6, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 8, generator=generator),
            pooled_projections=torch.randn(1, 8, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]
    return output


class Alone:
    """A communicator that claims a size but must never be used."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        raise AssertionError("nothing may be sent")

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        raise AssertionError("nothing may be sent")


def over(comm: Alone) -> Team:
    """A team that splits its sequence over all its members."""
    return Team(comm, GroupLayout(ulysses=comm.size))


class Echo(Alone):
    """A communicator whose peer sends what it gets."""

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return flat


@pytest.mark.parametrize(
    ("heads", "allowed"),
    [(4, (1, 2, 4)), (24, (1, 2, 3, 4, 6, 8)), (5, (1, 5)), (7, (1, 7)), (12, (1, 2, 3, 4, 6))],
)
def test_degrees_divide_the_heads(heads: int, allowed: tuple[int, ...]) -> None:
    assert degrees(small_flux(heads)) == allowed


def test_a_degree_that_does_not_divide_is_refused_before_anything_runs() -> None:
    layer = ElasticSP(small_flux(), joint=True)
    with pytest.raises(DegreeRefused) as refused, layer.step(over(Alone(3))):
        raise AssertionError("the step must not begin")
    assert (refused.value.degree, refused.value.heads) == (3, 4)
    assert refused.value.allowed == (1, 2, 4)


def test_degree_one_changes_nothing() -> None:
    model = small_flux()
    before = forward(model)
    layer = ElasticSP(model, joint=True)
    for team in (None, over(Alone(1))):
        with layer.step(team):
            assert torch.equal(forward(model), before)
    assert torch.equal(forward(model), before), "outside a step too"


def test_two_models_in_one_process_do_not_meet() -> None:
    one, other = small_flux(), small_flux()
    layer = ElasticSP(one, joint=True)
    ElasticSP(other, joint=True)
    expected = forward(other)
    with layer.step(over(Alone(2))):
        assert torch.equal(forward(other), expected)


def test_the_parallel_attention_can_be_replaced() -> None:
    """The seam for another attention gets the group, the local function and whole arguments."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def attention(team: Any, local: Any, inputs: AttentionInputs, others: Any) -> Tensor:
        seen.append((team.group.size, inputs.lengths))
        out: Tensor = local(query=inputs.query, key=inputs.key, value=inputs.value, **others)
        return out

    class Gathers(Alone):
        def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
            return torch.cat([shard] * 2, dim)

    model = small_flux()
    with ElasticSP(model, joint=True, attention=attention).step(over(Gathers(2))):
        assert forward(model).shape == (1, 6, 4)
    assert seen == [(2, (5, 4))] * 2


class Last(Alone):
    """The last member of a team, whose others have the same outputs as it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.rank = size - 1

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        return torch.cat([shard] * len(lengths), dim)


def met_lengths(model: Any, joint: bool, plan: Any, **inputs: Tensor) -> list[tuple[int, ...]]:
    """Over what the last of two members attends, call by call, where torch's own is called."""
    seen: list[tuple[int, ...]] = []

    def attention(team: Any, local: Any, inputs: AttentionInputs, others: Any) -> Tensor:
        seen.append(inputs.lengths)
        return inputs.query

    layer = ElasticSP(model, joint=joint, plan=plan, attention=attention)
    with torch.inference_mode(), layer.step(over(Last(2))):
        (out,) = model(**inputs, timestep=torch.tensor([1.0]), return_dict=False)
    assert out.shape[-2:] == inputs["hidden_states"].shape[-2:]
    return seen


def test_a_second_attention_of_a_joint_model_runs_over_the_image_alone() -> None:
    """Even where this member has no text, and could not tell it by its own tokens."""
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
    ).eval()
    text = {"encoder_hidden_states": torch.ones(1, 1, 8), "pooled_projections": torch.ones(1, 8)}
    lengths = met_lengths(model, True, sd3._PLAN, hidden_states=torch.ones(1, 4, 4, 6), **text)
    assert lengths == [(4, 3), (3, 3), (4, 3)]


def test_attention_to_a_whole_text_exchanges_nothing() -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    ).eval()
    text = torch.ones(1, 3, 8)
    inputs = {"hidden_states": torch.ones(1, 4, 4, 6), "encoder_hidden_states": text}
    assert met_lengths(model, False, pixart._PLAN, **inputs) == [(3, 3)] * 2


@pytest.mark.parametrize(
    ("total", "parts", "expected"),
    [(13, 4, (4, 3, 3, 3)), (8, 4, (2, 2, 2, 2)), (3, 4, (1, 1, 1, 0)), (0, 2, (0, 0))],
)
def test_split_lengths(total: int, parts: int, expected: tuple[int, ...]) -> None:
    assert split_lengths(total, parts) == expected
    assert expected == tuple(len(t) for t in torch.arange(total).tensor_split(parts))


@pytest.mark.parametrize("lengths", [(4, 3), (3, 3, 2, 1)])
def test_masks_of_keys_are_split_with_the_tokens(pool: Pool, lengths: tuple[int, ...]) -> None:
    members = pool.names[: len(lengths)]
    errors = pool.each(members, tasks.masked_attention, meet(pool, members), lengths)
    assert max(max(each) for each in errors) < 1e-5


def test_a_mask_over_all_streams_is_cut_where_they_are() -> None:
    layer = ElasticSP(small_flux(), joint=True)
    mask = torch.arange(9).view(1, 1, 1, 9)
    with pytest.raises(DiffusersMoved, match="mask"), layer.step(over(Alone(2))):
        layer.split("hidden_states", torch.zeros(1, 6, 4), 1)
        layer.split("encoder_hidden_states", torch.zeros(1, 3, 4), 1)
        assert layer.split("attention_mask", mask, 3).flatten().tolist() == [0, 1, 2, 6, 7]
        layer.split("attention_mask", mask[..., 1:], 3)


def test_a_mask_with_a_row_a_query_is_refused() -> None:
    tokens = torch.ones(1, 2, 4, 8)
    inputs = AttentionInputs(tokens, tokens, tokens, torch.ones(1, 1, 2, 2), (2, 2))
    with pytest.raises(DiffusersMoved, match="mask"):
        ulysses(Echo(2), lambda **_: torch.ones(1), inputs, {})


def small_ltx() -> Any:
    """An LTX of one block: attention among video tokens, then to the text."""
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=8,
        num_layers=1,
    ).eval()


def test_text_that_stays_whole_costs_no_exchange() -> None:
    """Two exchanges an attention among video tokens; attention to 3 text tokens has none."""

    class Counts(Echo):
        exchanges = 0

        def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
            self.exchanges += 1
            return flat

        def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
            return torch.cat([shard] * 2, dim)

    model, comm = small_ltx(), Counts(2)
    layer = ElasticSP(model, joint=False, cross="attn2")
    with torch.inference_mode(), layer.step(over(comm)):
        (output,) = model(
            hidden_states=torch.ones(1, 6, 4),
            encoder_hidden_states=torch.ones(1, 3, 8),
            timestep=torch.tensor([500.0]),
            encoder_attention_mask=torch.tensor([[True, True, False]]),
            num_frames=1,
            height=2,
            width=3,
            return_dict=False,
        )
    assert output.shape == (1, 6, 4) and comm.exchanges == 2


def test_cross_attention_of_another_name_is_noticed() -> None:
    with pytest.raises(DiffusersMoved, match="attn9"):
        ElasticSP(small_ltx(), joint=False, cross="attn9")


# ---- The upgrade guard: these facts of diffusers are what the layer stands on.


def test_diffusers_is_the_version_this_layer_was_tried_with() -> None:
    assert diffusers.__version__ == "0.42.1", "read elastic.py again, run all worker tests, pin"


def test_the_internals_are_where_the_layer_looks() -> None:
    flux, wan = FluxTransformer2DModel._cp_plan, WanTransformer3DModel._cp_plan
    assert set(flux[""]) == {"hidden_states", "encoder_hidden_states", "img_ids", "txt_ids"}
    assert flux["proj_out"].gather_dim == 1
    assert set(wan) == {"", "rope", "blocks.0", "proj_out"}
    assert all(entry.split_output and entry.split_dim == 1 for entry in wan["rope"].values())
    ltx, qwen = LTXVideoTransformer3DModel._cp_plan, QwenImageTransformer2DModel._cp_plan
    assert set(ltx[""]) == {"hidden_states", "encoder_hidden_states", "encoder_attention_mask"}
    every, first = "transformer_blocks.*", "transformer_blocks.0"
    assert set(qwen) == {first, every, "pos_embed", "proj_out"}
    assert set(qwen[every]) == {"modulate_index", "encoder_hidden_states_mask"}
    registry = attention_dispatch._AttentionBackendRegistry
    assert callable(registry._backends[attention_dispatch.AttentionBackendName.NATIVE])
    parameters = inspect.signature(attention_dispatch.dispatch_attention_fn).parameters
    assert "parallel_config" in parameters
    for block in (small_flux().transformer_blocks[0], small_flux().single_transformer_blocks[0]):
        assert hasattr(block.attn.processor, "_parallel_config")


@contextmanager
def without(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Changes an attribute for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@pytest.mark.parametrize(
    ("moved", "hint"),
    [
        (lambda: without(FluxTransformer2DModel, "_cp_plan", None), "_cp_plan"),
        (
            lambda: without(FluxTransformer2DModel, "_cp_plan", {"elsewhere": {}}),
            "elsewhere",
        ),
        (
            lambda: without(FluxTransformer2DModel, "_cp_plan", {"proj_out.*": {}}),
            "proj_out",
        ),
        (
            lambda: without(attention_dispatch, "_AttentionBackendRegistry", None),
            "_AttentionBackendRegistry",
        ),
    ],
)
def test_a_moved_internal_is_named(moved: Callable[[], Any], hint: str) -> None:
    model = small_flux()
    with moved(), pytest.raises(DiffusersMoved, match=hint):
        ElasticSP(model, joint=True)


def test_processors_without_the_attribute_are_named() -> None:
    model = small_flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor = object()
    with pytest.raises(DiffusersMoved, match="_parallel_config"):
        ElasticSP(model, joint=True)


def test_attention_that_goes_another_way_is_noticed() -> None:
    """Tokens that were split but never exchanged would give a wrong picture silently."""

    class Gathers(Alone):
        def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
            return torch.cat([shard] * 2, dim)

    model = small_flux()
    layer = ElasticSP(model, joint=True)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._parallel_config = None
    with pytest.raises(DiffusersMoved, match="attention"), layer.step(over(Gathers(2))):
        forward(model)
