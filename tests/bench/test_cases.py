"""The shipped experiments load and expand; settings and seeds are read as they are written."""

from pathlib import Path

import msgspec
import pytest

from bench.sim.case import CaseError, ClusterSpec, PoolSpec, models_of
from bench.sim.costs import Costs
from bench.sim.experiment import load_experiment, parse_seeds, run_row, settings_of
from control.scheduler.books.loads import LoadTable
from control.scheduler.policies import registry
from control.scheduler.settings import SettingError, Settings
from control.scheduler.summary import Summary
from control.scheduler.times.profile import Profile

BENCH = Path(__file__).parents[2] / "bench"
CASES = sorted((BENCH / "cases").glob("*.toml"))
POLICIES = {
    *("fixed-1", "fixed-2", "fixed-4", "fixed-8", "rssp", "rasp", "sjf", "srtf", "edf-greedy"),
    *("edf", "tetriserve", "genserve", "diflow", "disagfusion", "diffusers", "diffusers-c"),
    *("diffusers-s", "monolith", "hocket"),
}
SMALL = """
name = "small"
title = "A small one"
[cluster]
workers = 4
[profile]
file = "flux.1-dev_h100_h28.csv"
[workload]
name = "tetriserve-uniform"
count = 8
[sweep]
rate = [12, 60]
noise = [0.0, 0.1]
[[cells]]
slo_scale = 1.0
[[cells]]
slo_scale = 1.5
group_change_us = 3000
[[policies]]
name = "fixed-1"
[[policies]]
name = "tetriserve"
label = "events"
settings = { rounds = false, fill = false }
"""


def small(tmp_path, text=SMALL):
    (tmp_path / "small.toml").write_text(text)
    return load_experiment(tmp_path / "small.toml")


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_every_shipped_case_expands(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem and experiment.file.title
    assert len(set(experiment.labels)) == len(experiment.labels)
    listed = experiment.file.policies
    assert {p.name for p in listed} <= POLICIES
    known = [p.shown for p in listed if p.name in registry.names()]
    runs = experiment.runs([3], known)
    assert len(runs) == len(known) * len(experiment.cells())
    cells = [r.cell for r in runs]
    assert len({msgspec.json.encode(c) for c in cells}) == len(experiment.cells())
    for row in experiment.file.paper:
        assert row.policy in experiment.labels, row
        assert any(row.cell.items() <= c.items() for c in cells), row
    case = runs[-1].to_case()
    assert case.trace and case.settings.policy in registry.names()


def test_there_is_a_case_for_each_experiment():
    names = " ".join(p.stem for p in CASES)
    for wanted in (
        *(f"t{i}-" for i in range(1, 7)),
        *(f"g{i}-" for i in range(1, 7)),
        *[
            "diflow-scale",
            "diflow-burst",
            "disagfusion-elasticity",
            "disagfusion-slo",
            "mixed-burst",
        ],
        *["mixed-image-video", "columns", "columns-moving"],
    ):
        assert wanted in names, wanted
    assert len(load_experiment(BENCH / "cases/columns.toml").cells()) == 12


def test_the_shipped_profiles_and_weights_read():
    for path in sorted((BENCH / "assets/profiles").glob("*.csv")):
        profile = Profile.from_csv(path.read_text())
        assert all(models_of(profile, k.gpu) for k in profile.cells), path
    weights = [p for p in (BENCH / "assets/loads").glob("*.csv") if "peaks" not in p.name]
    assert weights and all(LoadTable.from_csv(p.read_text()) for p in weights)


def test_models_follow_from_the_profile():
    text = (BENCH / "assets/profiles/genserve_rtx-pro-6000_x1.5.csv").read_text()
    image, video = models_of(Profile.from_csv(text), "rtx-pro-6000")
    assert (image.name, image.degrees, image.batch_max) == ("sd3.5-medium", (1,), 8)
    assert (video.name, video.degrees, video.batch_max) == ("wan2.2-5b", (1, 2, 4, 8), 1)


def test_cells_are_the_product_and_runs_their_rows(tmp_path):
    runs = small(tmp_path).runs([0, 1])
    assert len(runs) == 2 * 2 * 2 * 2 * 2
    assert runs[0].cell == {
        "workload": "tetriserve-uniform", "count": 8, "slo_scale": 1.0, "rate": 12, "noise": 0.0
    }  # fmt: skip
    assert runs[-1].costs == Costs(group_change_us=3000, noise=0.1)
    case = runs[-1].to_case()
    assert not case.settings.rounds and case.settings.policy_settings == {"fill": False}
    assert case.settings.group_change_us == 3000, "the planner is told"
    row = run_row(runs[-1])
    summary = msgspec.convert(row["summary"], Summary)
    assert summary.requests == 8 and row["label"] == "events" and row["gpus"] == 4
    assert sum(len(c["latency_s"]) for c in row["classes"].values()) == 8
    assert sum(c["met"] for c in row["classes"].values()) == summary.met


def test_policies_can_be_chosen_and_added(tmp_path):
    experiment = small(tmp_path)
    assert {r.policy.shown for r in experiment.runs([0], ["events"])} == {"events"}
    assert {r.policy.shown for r in experiment.runs([0], ["fixed-2"])} == {"fixed-2"}
    with pytest.raises(CaseError, match="policies = 'best'"):
        experiment.runs([0], ["best"])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "fixed-1"', 'name = "fixed-3"', "policy = 'fixed-3'.*fixed-1"),
        ("fill = false", "full = false", "full.*one of.*fill"),
        ("slo_scale = 1.5", "slo = 1.5", "workload.slo = 1.5.*slo_scale"),
        ("group_change_us = 3000", "group_change_us = -3", "group_change_us = -3"),
        ("noise = [0.0, 0.1]", "noise = [2.0]", "noise = 2.0"),
        ("workers = 4", "workers = 0", "cluster.workers = 0"),
        ("h28.csv", "h29.csv", "profile.file = .*h28"),
    ],
)
def test_what_is_wrong_in_a_case_is_named(tmp_path, old, new, told):
    assert old in SMALL
    with pytest.raises(ValueError, match=told):
        small(tmp_path, SMALL.replace(old, new)).runs([0])


def test_settings_are_read_in_their_types():
    given = {"rounds": "false", "step_granularity": "3", "straddle": "0.5", "fill": "true"}
    read = settings_of("tetriserve", given, Settings(), Costs(group_cold_us=7))
    assert (read.rounds, read.step_granularity, read.straddle) == (False, 3, 0.5)
    assert read.policy_settings == {"fill": True} and read.group_cold_us == 7
    for given, told in (
        ({"rounds": "maybe"}, "rounds = 'maybe'.*true"),
        ({"straddle": "x"}, "straddle"),
        ({"straddle": "3"}, "straddle = 3.0"),
        ({"degree": "2"}, "one of.*fill.*rounds"),
        ({"policy": "edf"}, "one of"),
    ):
        with pytest.raises(SettingError, match=told):
            settings_of("tetriserve", given, Settings(), Costs())


def test_seeds():
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]
    for text in ("", "3-1", "a", "-1", "1-", "1,,2"):
        with pytest.raises(CaseError, match="seeds"):
            parse_seeds(text)


def test_pools_are_kinds_that_run_some_nodes() -> None:
    cluster = ClusterSpec(pools="2 big dit, 1 small text vae, 1 big")
    assert cluster.kinds() == {"w0000": "big", "w0001": "big", "w0100": "small", "w0200": "big"}
    for wrong in ("big dit", "0 big", "2", "2 big unet", "2 big dit,"):
        with pytest.raises(CaseError, match=r"cluster\.pools"):
            PoolSpec.read(wrong)
