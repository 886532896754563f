"""The command line that others call: options, files, exit states."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import sweep as sweep_module
from bench.__main__ import app
from bench.sim.trace import write_trace
from bench.sim.workloads import generate
from control.scheduler.schedule_log import DoneLine, HeaderLine, RunLine, read_log
from control.scheduler.summary import Summary

from .test_cases import SMALL

PROFILE = Path(__file__).parents[2] / "bench/assets/profiles/flux.1-dev_h100_h28.csv"
LOADS = PROFILE.parents[1] / "loads/flux.1-dev_h100_loads.csv"


def bench(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(write_trace(generate("tetriserve-uniform", 0, {"count": 12, "rate": 30})))
    return path


def single(trace, *more, code=0):
    files = (trace.parent / "log.jsonl", trace.parent / "summary.json")
    told = bench(
        *("sim", "--trace", trace, "--profile", PROFILE, "--seed", 1),
        *("--schedule-log", files[0], "--summary", files[1], *more),
        code=code,
    )
    return told, *files


def test_one_run_writes_log_and_summary(trace):
    told, log, summary = single(
        *(trace, "--gpus", 8, "--hosts", 2, "--policy", "tetriserve", "--set", "rounds=false"),
        *("--noise", 0.1, "--group-change-us", 3000, "--group-cold-us", 10000),
    )
    lines = read_log(log.read_text())
    assert isinstance(lines[0], HeaderLine) and len(lines[0].workers) == 8
    assert sum(isinstance(x, DoneLine) for x in lines) == 12
    assert any(isinstance(x, RunLine) and len(x.gpus) > 1 for x in lines)
    found = json.loads(summary.read_text())
    assert set(found) == set(Summary.__struct_fields__) - {"promises"}  # nobody was told anything
    assert found["requests"] == 12
    assert "attainment" in told and found["plan_ms"]["p99"] > 0


def test_the_same_seed_gives_the_same_log(trace):
    logs = []
    for seed in (1, 1, 2):
        _, log, _ = single(trace, "--policy", "fixed-1", "--noise", 0.2, "--seed", seed)
        logs.append(log.read_text())
    assert logs[0] == logs[1] != logs[2]


def test_weights_are_loaded_inside_the_runs(trace):
    options = ("--policy", "fixed-1", "--loads", LOADS, "--memory-mib", 40_000)
    _, log, _ = single(trace, *options)
    lines = [x for x in read_log(log.read_text()) if isinstance(x, RunLine)]
    first = min((x for x in lines if x.node == "dit"), key=lambda x: x.start_us)
    assert first.end_us - first.start_us >= 2_942_000


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--policy best", "policy = 'best': allowed is one of diffusers"),
        ("--policy fixed-1 --set width=3", "fixed-1.width = '3': allowed is one of"),
        ("--set rounds", "--set = 'rounds': allowed is key=value"),
        ("--noise 1.5", "noise = 1.5"),
        ("--gpus 8 --hosts 3", "--gpus = 8: allowed is a multiple of --hosts, 3"),
        ("--gpu tpu", "tpu"),
    ],
)
def test_bad_input_exits_2_and_names_it(trace, options, told):
    assert told in single(trace, *options.split(), code=2)[0]


def test_bad_files_exit_2(trace, tmp_path):
    assert "--case" in bench("sim", code=2)
    bench("sim", "--trace", tmp_path / "none.jsonl", "--profile", PROFILE, code=2)
    trace.write_text(trace.read_text().replace("flux.1-dev", "flux.2", 1))
    assert "trace.model = 'flux.2'" in single(trace, code=2)[0]
    trace.write_text("{}\n")
    assert "trace line 1" in single(trace, code=2)[0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_experiment_writes_rows_in_order(tmp_path, jobs):
    (tmp_path / "small.toml").write_text(SMALL.replace("rate = [12, 60]", "rate = [60]"))
    out = tmp_path / "out"
    told = bench(
        *("sim", "--case", tmp_path / "small.toml", "--seeds", "0-1", "--policies"),
        *("fixed-1,events", "--jobs", jobs, "--out", out),
    )
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 * 2 and "16 runs" in told
    order = [(r["cell"]["slo_scale"], r["cell"]["noise"], r["label"], r["seed"]) for r in rows]
    assert order[:5] == [
        (1.0, 0.0, "fixed-1", 0),
        (1.0, 0.0, "fixed-1", 1),
        (1.0, 0.0, "events", 0),
        (1.0, 0.0, "events", 1),
        (1.0, 0.1, "fixed-1", 0),
    ]
    wanted = "case title cell policy label settings seed gpus profile costs summary classes bound"
    assert set(wanted.split()) | {"plans", "wall_s"} == set(rows[0])
    assert (out / "case.toml").read_text() == (tmp_path / "small.toml").read_text()
    assert "commit " in (out / "command.txt").read_text()


def test_resuming_runs_what_is_missing_and_keeps_the_rest(tmp_path, monkeypatch):
    path, out = tmp_path / "small.toml", tmp_path / "out"
    path.write_text(SMALL.replace("rate = [12, 60]", "rate = [60]"))

    def swept(seeds, *more):
        ran.clear()
        bench("sim", "--case", path, "--seeds", seeds, "--out", out, *more)
        rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
        return {(str(r["cell"]), r["label"], r["seed"]): r for r in rows}

    ran = []
    real = sweep_module.run_row
    monkeypatch.setattr(sweep_module, "run_row", lambda *a: ran.append(a) or real(*a))
    first = swept("0-1", "--policies", "fixed-1")
    assert len(first) == len(ran) == 8
    assert swept("0", "--policies", "fixed-1", "--resume") == first and not ran
    both = swept("1", "--policies", "events", "--resume", "--bounds")
    assert len(both) == 12 and len(ran) == 4
    for (cell, label, seed), row in both.items():
        assert (row["bound"] is not None) is (seed == 1)
        if seed == 1:
            assert row["bound"] >= row["summary"]["attainment"]
            assert label == "events" or row == {**first[cell, label, 1], "bound": row["bound"]}


def test_a_policy_that_does_not_exist_stops_an_experiment_at_once(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL.replace("fixed-1", "fixed-3"))
    told = bench("sim", "--case", tmp_path / "small.toml", "--out", tmp_path / "out", code=2)
    assert "policy = 'fixed-3'" in told and not (tmp_path / "out").exists()


def test_a_trace_is_the_one_that_a_case_has(trace, tmp_path):
    out = tmp_path / "t.jsonl"
    options = ("--set", "count=12", "--set", "rate=30", "--out", out)
    assert "12 requests" in bench("trace", "tetriserve-uniform", *options)
    assert out.read_text() == trace.read_text()
    assert "workload.name = 'tetris'" in bench("trace", "tetris", "--out", out, code=2)
    told = bench("trace", "tetriserve-uniform", *options, "--set", "rate=x", code=2)
    assert "Expected `float`, got `str` - at `$.rate`" in told


def test_solver(tmp_path):
    out = tmp_path / "solver.json"
    options = ["--gpus", "16", "--requests", "12", "--rounds", "20", "--policy", "tetriserve"]
    told = bench("solver", *options, "--out", out)
    figures = json.loads(out.read_text())
    assert figures["plans"] == 20 and 0 < figures["p50_ms"] <= figures["max_ms"]
    assert "p99 ms" in told


def test_without_a_folder_a_case_must_be_one_run(tmp_path):
    path, log = tmp_path / "small.toml", tmp_path / "log.jsonl"
    path.write_text(SMALL)
    assert "--out = None: allowed is a folder" in bench("sim", "--case", path, code=2)
    one = SMALL.replace("rate = [12, 60]", "rate = [60]").replace("noise = [0.0, 0.1]", "")
    path.write_text(one.replace("[[cells]]\nslo_scale = 1.5\ngroup_change_us = 3000\n", ""))
    bench("sim", "--case", path, "--seeds", 3, "--policies", "events", "--schedule-log", log)
    assert sum(isinstance(x, DoneLine) for x in read_log(log.read_text())) == 8
