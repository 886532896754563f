"""What the latency model makes of measurements: forms, quantiles, unseen sizes, other profiles."""

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from control.scheduler.settings import Settings
from control.scheduler.times.call_form import CELLS_MIN, CallForm
from control.scheduler.times.estimate import Estimator
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import Layout, Shape

from .driving import FLUX_CSV

PROFILE = Profile.from_csv(FLUX_CSV)
SIZES, DEGREES = (256, 512, 768, 1024, 1536, 2048), (1, 2, 4, 8)


def key(px=512, degree=1, batch=1):
    shape, layout = Shape(width=px, height=px), Layout(ulysses=degree)
    return CellKey("flux.1-dev", "h100", "dit", shape, layout, batch)


def formula(launch, linear, quadratic, collectives, traffic):
    def us(k):
        v, d = k.batch * k.shape.width * k.shape.height / 1e6, k.layout.degree
        size = k.shape.width * k.shape.height / 1e6
        shared = collectives + traffic * v * (d - 1) / d if d > 1 else 0.0
        return launch + (linear * v + quadratic * v * size) / d + shared

    return us


# ------------------------------------------------------------------------------------ the form


@given(
    st.tuples(
        st.floats(1e3, 1e5), st.floats(1e3, 1e6), st.floats(0, 1e5), st.floats(0, 1e5),
        st.floats(0, 1e5),
    ),
    st.sampled_from([(px, d) for px in SIZES[1:-1] for d in DEGREES]),
)  # fmt: skip
def test_what_follows_the_form_is_found_again(coefficients, left_out):
    us = formula(*coefficients)
    cells = {key(px, d): us(key(px, d)) for px in SIZES for d in DEGREES}
    missing = key(*left_out)
    true_us = cells.pop(missing)
    assert CallForm(cells).call_us(missing) == pytest.approx(true_us, rel=0.05)


def test_one_odd_cell_bends_nothing_far_from_it():
    us = formula(20_000, 150_000, 10_000, 5_000, 2_000)
    cells = {key(px, d): us(key(px, d)) for px in SIZES for d in DEGREES}
    cells[key(2048, 8)] *= 5
    missing = key(512, 1)
    true_us = cells.pop(missing)
    assert CallForm(cells).call_us(missing) == pytest.approx(true_us, rel=0.05)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(SIZES), st.sampled_from(DEGREES), st.sampled_from([1, 2, 4])),
        st.integers(1, 10**8),
        min_size=CELLS_MIN,
    ),
    st.sampled_from([(px, d, b) for px in (300, 900, 1800) for d in DEGREES for b in (1, 3)]),
)
def test_an_estimate_is_positive_and_finite_and_the_same_twice(times, wanted):
    cells = {key(*k): float(us) for k, us in times.items()}
    form, again = CallForm(cells), CallForm(dict(reversed(cells.items())))
    assume(form.covers(key(*wanted)))
    us = form.call_us(key(*wanted))
    assert us == again.call_us(key(*wanted))
    assert 0.001 * min(times.values()) <= us < math.inf


def test_cells_that_contradict_each_other_make_no_call_free():
    """A hundred times faster at degree 2 than at 1: nothing of the form is left at degree 1."""
    times = {(256, 1, 1): 46344, (256, 2, 4): 301, (256, 4, 4): 248, (512, 2, 1): 161}
    us = CallForm({key(*k): float(t) for k, t in times.items()}).call_us(key(300))
    assert 4_634 <= us <= 60_000


def test_what_lies_beyond_the_known_sizes_is_left_to_the_relatives():
    form = CallForm({key(px, d): 1e5 for px in (512, 1024) for d in (1, 2)})
    assert form.covers(key(700, 2)) and not form.covers(key(256)) and not form.covers(key(2048))
    assert not form.covers(key(700, 1, batch=2)), "no batch was ever seen"


# ------------------------------------------------------------------------------------ by degree


def test_the_last_layout_read_of_a_degree_counts():
    head = "model,gpu,node,width,height,frames,degree,batch,call_us,cfg,ulysses,ring\n"
    rows = ("m,g,dit,8,8,1,4,1,100,,,\n", "m,g,dit,8,8,1,4,1,70,2,2,1\n")
    at = CellKey("m", "g", "dit", Shape(width=8, height=8), Layout(ulysses=4), 1)
    for order, us in ((rows, 70), (rows[::-1], 100)):
        profile = Profile.from_csv(head + "".join(order))
        assert profile.call_us(at) == us
        halves = at._replace(layout=Layout(cfg=2, ulysses=2))
        assert profile.call_us(halves) == 70
        assert Estimator(profile, Settings()).estimate_us(at._replace(gpu="other")) == us


# ------------------------------------------------------------------------------------ learning


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(DEGREES)), max_size=60))
def test_what_is_measured_as_estimated_changes_no_mean(cells):
    model, fresh = LatencyModel(PROFILE, Settings()), LatencyModel(PROFILE, Settings())
    everything = [key(px, d, b) for px in (*SIZES, 900) for d in DEGREES for b in (1, 2)]
    for px, degree in cells:
        cell = key(px, degree)
        assert model.observe(cell, fresh.predict(cell).mean_us, ("w0",)) is None
        assert model.predict(cell).safe_us == fresh.predict(cell).mean_us, "no noise, no margin"
    assert [model.predict(k).mean_us for k in everything] == [
        fresh.predict(k).mean_us for k in everything
    ]


def test_an_unseen_size_once_measured_tells_of_those_near_it():
    model = LatencyModel(PROFILE, Settings())
    for px in (512, 1024):  # the machine is as its profile says
        model.observe(key(px), PROFILE.call_us(key(px)))
    near, far = key(1500), key(300)
    before_near, before_far = model.predict(near).mean_us, model.predict(far).mean_us
    seen = key(1408)
    really_us = round(1.5 * model.predict(seen).mean_us)
    for _ in range(5):
        model.observe(seen, really_us)
    assert model.predict(near).mean_us > 1.15 * before_near
    moved_far = abs(model.predict(far).mean_us / before_far - 1)
    assert moved_far < abs(model.predict(near).mean_us / before_near - 1) / 2


def noisy(quantile, seed=5, count=15, sigma=0.1):
    model, rng = LatencyModel(PROFILE, Settings(safe_quantile=quantile)), random.Random(seed)
    for _ in range(40):
        model.observe(key(1024), round(201_800 * math.exp(rng.gauss(0, sigma))))
    for _ in range(count):
        model.observe(key(512), round(55_500 * math.exp(rng.gauss(0, sigma))))
    return model


def test_a_higher_quantile_is_no_lower():
    safe = [noisy(q).predict(key(512)).safe_us for q in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)]
    assert safe == sorted(safe) and safe[-1] > safe[0]


def test_a_cell_with_few_measurements_leans_on_its_family():
    few, alone = noisy(0.9, count=1), LatencyModel(PROFILE, Settings())
    alone.observe(key(512), 55_500)
    mean, safe = few.predict(key(512))
    assert safe / mean > 1.05 and alone.predict(key(512)).safe_us == 55_500
    unmeasured = few.predict(key(2048))
    assert unmeasured.safe_us / unmeasured.mean_us > 1.05


def test_what_was_learned_holds_under_another_profile():
    """Times were measured, whatever they were compared with."""
    model = LatencyModel(PROFILE, Settings())
    for _ in range(20):
        model.observe(key(512), 80_000)
    twice = Profile({k: 2 * us for k, us in PROFILE.cells.items()})
    other = LatencyModel(twice, Settings())
    other.restore(model.snapshot())
    assert other.predict(key(512)).mean_us == pytest.approx(80_000, abs=2)
