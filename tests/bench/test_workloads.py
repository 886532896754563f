"""Traces are what the published families say, byte for byte, and change only where they should."""

import hashlib
from itertools import pairwise

import pytest

from bench.sim.case import CaseError
from bench.sim.trace import write_trace
from bench.sim.workloads import generate

# sha256 of traces of seed 3, made by an independent generator of the same families
PINNED = {
    ("tetriserve-uniform", ()): "9257fc8f432a1103b9747b3ba48d024b846e93a1d6fa2f2dae993978b8f01b99",
    (
        "tetriserve-skewed",
        (("rate", 18), ("slo_scale", 1.2)),
    ): "9368aa621f675a912939a04204aceba4757f8ad5566db56b1ccfb9ae20cf9bca",
    (
        "tetriserve-uniform",
        (("calibration", "h50"),),
    ): "841def3a71b27611e8936cbd8256b41516872adef61b2d6e9d15aee5dc4544f2",
    (
        "genserve-light-skewed",
        (),
    ): "084a4d367342b3083f80b1ef3a2989d22a274d2d0b3dfa77990999fe7f1e5125",
    (
        "genserve-balanced-uniform",
        (),
    ): "6f28fd2fabbef6961257a189fa73e6693da2851a9c101ff12b544c48161d8e63",
    (
        "genserve-heavy-skewed",
        (("rate", 36), ("slo_scale", 1.3)),
    ): "4dcdaedced6412868a43359b3d750619ee407009b426f4a49ceba50fcfc2332e",
    ("mixed-burst", ()): "b4766589ea16b0a54a93d44375de1a9c918e6e85d7afdaf27c6668d25bb5cde3",
}
MIX = [{"model": "m", "width": 64, "height": 64, "steps": 4, "slo_s": 1.0}]


@pytest.mark.parametrize("which", PINNED, ids=lambda w: w[0])
def test_the_published_families_are_pinned(which):
    name, parameters = which
    text = write_trace(generate(name, 3, dict(parameters)))
    assert hashlib.sha256(text.encode()).hexdigest() == PINNED[which]
    assert write_trace(generate(name, 4, dict(parameters))) != text


def test_runs_of_different_settings_are_paired():
    slow, fast = (generate("tetriserve-skewed", 7, {"rate": r}) for r in (6, 12))
    assert [r.width for r in slow] == [r.width for r in fast]
    assert all(abs(a.arrival_us - 2 * b.arrival_us) <= 2 for a, b in zip(slow, fast, strict=True))
    tight, loose = (generate("genserve-heavy-uniform", 7, {"slo_scale": s}) for s in (0.8, 1.6))
    assert [r.arrival_us for r in tight] == [r.arrival_us for r in loose]
    assert all(abs(2 * a.slo_us - b.slo_us) <= 1 for a, b in zip(tight, loose, strict=True))


def gaps_cv(trace):
    gaps = [b.arrival_us - a.arrival_us for a, b in pairwise(trace)]
    mean = sum(gaps) / len(gaps)
    return (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_gamma_gaps_have_their_regularity(cv):
    trace = generate("tetriserve-uniform", 1, {"count": 20_000, "cv": cv})
    assert gaps_cv(trace) == pytest.approx(cv, abs=0.06)
    assert trace[-1].arrival_us / 1e6 == pytest.approx(20_000 * 5, rel=0.05)


def test_diflow_request_scale_shares_and_burst():
    trace = [
        r for seed in range(20) for r in generate("diflow-schnell", seed, {"request_scale": 8})
    ]
    assert len(trace) == pytest.approx(20 * 120 * 0.74 * 8, rel=0.05)
    canny = [r for r in trace if r.model == "flux.1-schnell+canny"]
    assert len(canny) / len(trace) == pytest.approx(0.31, abs=0.02)
    assert {(r.steps, r.width, r.slo_us) for r in canny} == {(4, 1024, 4_137_600)}
    burst = generate("diflow-schnell", 1, {"request_scale": 8, "burst_factor": 5})
    inside = sum(40e6 <= r.arrival_us < 60e6 for r in burst)
    assert inside == pytest.approx(0.74 * 8 * 5 * 20, rel=0.15)


def test_elasticity_has_three_phases():
    trace = generate("disagfusion-elasticity", 0, {})
    steps = [[r.steps for r in trace if p * 3e8 <= r.arrival_us < (p + 1) * 3e8] for p in range(3)]
    assert steps[0] == [4] * 30 and steps[2] == [1] * 60
    assert steps[1].count(1) == len(steps[1]) // 2


def test_phases():
    phases = [
        {"duration_s": 10, "rate": 60, "cv": 0.0, "mix": MIX},
        {"duration_s": 5, "rate": 120, "cv": 0.0, "mix": MIX},
    ]
    trace = generate("phases", 0, {"phases": phases})
    assert [r.arrival_us for r in trace[:2]] == [1_000_000, 2_000_000]
    assert sum(r.arrival_us >= 10_000_000 for r in trace) == 9


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("tetriserve", {}, "workload.name = 'tetriserve'.*tetriserve-uniform"),
        ("mixed-burst", {"rates": 3}, "workload.rates = 3.*one of count, rate"),
        ("mixed-burst", {"rate": -3}, "workload.rate = -3"),
        ("tetriserve-skewed", {"calibration": "h99"}, "h99"),
        ("diflow-schnell", {"burst_from_s": 70, "burst_factor": 2}, "burst_from_s = 70"),
        ("phases", {"phases": [{"duration_s": 0, "rate": 1, "mix": MIX}]}, r"phases\[0\]"),
    ],
)
def test_what_is_wrong_is_named(name, parameters, told):
    with pytest.raises(CaseError, match=told):
        generate(name, 0, parameters)
