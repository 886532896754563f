"""`python -m bench gpu --tiny`: what will run on a GPU runs here, and writes its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.gpu.report import gpu_kind, profile_csv, write_report
from control.scheduler.times.profile import Profile
from gpuworker.measuring.facts import MODELS, TINY_MODELS
from gpuworker.measuring.record import Cell, MeasurementLog
from gpuworker.measuring.sizes import SIZES, TINY

SECTIONS = "tiny-wan,groups"


def bench(folder: Path, sections: str, *more: str) -> str:
    given = ["gpu", "--tiny", f"--output={folder}", f"--sections={sections}", *more]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 0, (ran.output, [log.read_text() for log in folder.glob("*.log")])
    return ran.output


def cells(folder: Path, section: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{section}.jsonl").read_text().splitlines()]


def test_tiny_steps_and_groups(tmp_path: Path) -> None:
    bench(tmp_path, SECTIONS)
    found = cells(tmp_path, "tiny-wan")
    assert [(f["cell"]["node"], f["cell"]["compile"]) for f in found] == [
        ("dit", "off"),
        ("dit", "default"),
        ("vae", "off"),
    ]
    assert all(f["difference"] == 0.0 and f["finite"] for f in found[:2])
    assert [f["usable_after"] for f in cells(tmp_path, "groups")[:1]] == [True]
    readme = (tmp_path / "README.md").read_text()
    assert "ours / plain" in readme and "Communicators" in readme and "## Failed" not in readme
    profile = Profile.from_csv((tmp_path / "profile.csv").read_text())
    assert {(key.model, key.gpu, key.node) for key in profile.cells} == {
        ("tiny-wan", "cpu", "dit"),
        ("tiny-wan", "cpu", "vae"),
    }


def test_a_record_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    wanted: list[Cell] = [{"batch": batch} for batch in (1, 2, 3)]
    path = tmp_path / "section.jsonl"
    assert list(MeasurementLog(path, minutes=0).wanted(wanted)) == []
    record = MeasurementLog(path, minutes=60)
    record.add(wanted[1], ours_us=[1])
    assert list(record.wanted(wanted)) == list(MeasurementLog(path, 60).wanted(wanted))
    assert [cell["batch"] for cell in MeasurementLog(path, 60).wanted(wanted)] == [1, 3]


def test_sizes_are_those_that_the_command_names() -> None:
    assert tuple(SIZES) == MODELS and tuple(TINY) == TINY_MODELS


@pytest.mark.full
@pytest.mark.timeout(900)
def test_tiny_layouts_and_mesh(tmp_path: Path) -> None:
    bench(tmp_path, "layouts,mesh")
    served = json.loads((tmp_path / "mesh.json").read_text())["requests"]
    assert len(served) == 6 and all(r["outcome"] == "finished" for r in served)
    assert all(f["difference"] < 1e-4 for f in cells(tmp_path, "layouts"))


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["gpu", "--tiny", f"--output={tmp_path}", "--sections=none"])
    assert ran.exit_code == 2 and "none" in ran.output and "groups" in ran.output


def found_cell(batch: int, **found: object) -> dict[str, object]:
    cell = {"model": "m", "node": "dit", "shape": "8x8", "width": 8, "height": 8, "frames": 1}
    return {"cell": {**cell, "compile": "off", "batch": batch}, **found}


def test_what_did_not_fit_or_failed_is_listed(tmp_path: Path) -> None:
    device = {"device": "NVIDIA H100 80GB HBM3", "torch": "2", "diffusers": "0", "command": "gpu"}
    (tmp_path / "device.json").write_text(json.dumps(device))
    measured = {"ours_us": [10, 12, 11], "plain_us": [10, 10, 10], "first_us": 9, "peak_bytes": 1}
    lines = [
        found_cell(1, **measured, difference=0.0, scale=1.0, finite=True),
        found_cell(2, out_of_memory=True, tried=True),
        found_cell(4, out_of_memory=True, tried=False),
        found_cell(8, error="ValueError: planted"),
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "| m | 8x8 | 1 | off | 0.01 | 0.01 | 1.100 (0.852 to 1.348), n 3 |" in readme
    assert "| 2 | off | out of memory |" in readme and "| 4 | off | not tried" in readme
    assert "ValueError: planted" in readme.split("## Failed")[1]
    (row,) = profile_csv(lines, device).splitlines()[1:]
    assert row.startswith("m,h100,dit,8,8,1,1,1,11,")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "4090"), ("cpu", "cpu")],
)
def test_a_device_is_called_by_its_number(name: str, kind: str) -> None:
    assert gpu_kind({"device": name}) == kind
