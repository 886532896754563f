"""The latency model: profile, estimates, refinement."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.scheduler.settings import Settings
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import Layout, Shape

from .driving import FLUX_CSV


def key(px=512, degree=1, *, gpu="h100", model="flux.1-dev", node="dit", batch=1):
    shape = Shape(width=px, height=px)
    return CellKey(model, gpu, node, shape, Layout(ulysses=degree), batch)


@pytest.fixture
def model():
    return LatencyModel(Profile.from_csv(FLUX_CSV), Settings(safe_factor=1.1))


def test_a_profiled_cell_is_taken_as_it_is(model):
    assert model.predict(key(2048, 8)) == (141_800, 155_980)


def test_an_unknown_gpu_falls_back_to_a_known_one(model):
    assert model.predict(key(gpu="b200")).mean_us == 55_500


def test_an_unknown_model_gets_a_conservative_default(model):
    assert model.predict(key(model="other")).mean_us == 1_000_000
    assert model.predict(key(model="other", degree=4)).mean_us == 500_000


def test_unseen_shapes_lie_between_their_neighbours(model):
    for degree in (1, 2, 4, 8):
        below, here, above = (model.predict(key(px, degree)).mean_us for px in (512, 768, 1024))
        assert below * 0.9 <= here <= above * 1.1
    assert model.predict(key(4096)).mean_us > 3.9 * 998_600


def test_missing_degrees_and_batches_are_estimated(model):
    assert 0.5 * 141_800 < model.predict(key(2048, 16)).mean_us < 141_800
    assert model.predict(key(512, batch=4)).mean_us == 4 * 55_500
    one = LatencyModel(
        Profile.from_csv(
            "model,gpu,node,width,height,frames,degree,batch,call_us\nm,g,dit,8,8,1,2,1,100\n"
        ),
        Settings(),
    )
    shape = Shape(width=8, height=8)
    assert one.predict(CellKey("m", "g", "dit", shape, Layout(), 1)).mean_us == 200
    assert one.predict(CellKey("m", "g", "vae", shape, Layout(), 1)).mean_us == 1_000_000


def test_one_outlier_moves_nothing(model):
    before = model.predict(key())
    model.observe(key(), 5_550_000)
    assert model.predict(key()).mean_us == before.mean_us
    for _ in range(8):
        model.observe(key(), 55_500)
    model.observe(key(), 5_550_000)
    assert model.predict(key()).safe_us == 55_500


def test_measurements_outvote_the_profile_cell_by_cell(model):
    for _ in range(3):
        model.observe(key(), 111_000)
    assert model.predict(key()).mean_us == 111_000


def test_ratios_are_bounded(model):
    for _ in range(20):
        model.observe(key(), 10**12)
    assert model.predict(key()).mean_us == 20 * 55_500


@given(st.lists(st.integers(1, 10**7), max_size=40))
def test_safe_is_never_below_the_mean(times):
    model = LatencyModel(Profile.from_csv(FLUX_CSV), Settings())
    for t in times:
        model.observe(key(), t)
    mean, safe = model.predict(key())
    assert 0 < mean <= safe


def test_a_snapshot_restores(model):
    for t in (60_000, 70_000, 80_000):
        model.observe(key(), t)
    other = LatencyModel(Profile.from_csv(FLUX_CSV), Settings(safe_factor=1.1))
    other.restore(model.snapshot())
    assert other.snapshot() == model.snapshot()
    assert other.predict(key()) == model.predict(key())


def test_an_unmeasured_layout_borrows_what_its_shape_has_learned(model):
    """A machine twice as slow as its profile is so at every degree, tried or not."""
    narrow, wide = key(degree=1), key(degree=2)
    before = model.predict(wide).mean_us
    for _ in range(5):
        model.observe(narrow, 2 * 55_500)
    assert model.predict(wide).mean_us == pytest.approx(2 * before, rel=0.01)
    for _ in range(5):
        model.observe(wide, before)
    assert model.predict(wide).mean_us == pytest.approx(before, rel=0.01)
