"""The report of small synthetic runs: every file is written, parses, and says the right numbers."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from bench.report import report, report_command
from bench.reporting.analysis import carried, compared, standings, sweeps
from bench.reporting.rows import ReportError, read_experiment
from bench.reporting.statistics import PolicyVerdict

from .making import CLASSES, row, swept, write


def well_formed(path: Path) -> ElementTree.Element:
    """The page's root; nothing in it may point outside."""
    text = path.read_text()
    root = ElementTree.fromstring(text)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not (name.endswith("src") or value.startswith(("http:", "https:"))), value
        assert not element.tag.endswith("script")
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    return root


def test_every_file_is_written_and_parses(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", swept(workloads=("uniform", "skewed")))
    written = report(folder)
    assert {p.name for p in written} == {"README.md", "report.html", "curves.png"}
    root = well_formed(folder / "report.html")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}svg"))) == 4
    with Image.open(folder / "curves.png") as picture:
        assert picture.width == 1430 and picture.height > 200
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    readme = (folder / "README.md").read_text()
    assert "# Synthetic & small" in readme and "some <machine>" in readme
    assert "seeds 0–2" in readme and "▲ ahead" in readme


def test_report_depends_on_the_rows_alone(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        report(write(tmp_path / name, swept()))
        files = sorted((tmp_path / name).iterdir())
        found.append([(p.name, p.read_bytes()) for p in files])
    assert found[0] == found[1]


def test_standings_and_verdicts(tmp_path: Path) -> None:
    e = read_experiment(write(tmp_path, swept()), "hocket")
    assert e.series == ("hocket", "edf", "hocket no aging")
    assert e.rivals == ("edf",)
    (first, *_) = standings(e)
    ours, rival = first.of("hocket"), first.best_rival
    assert ours is not None and rival is not None
    assert ours.attainment.mean == pytest.approx(0.93)
    assert ours.gap is not None and ours.gap.mean == pytest.approx(0.02)
    assert rival.difference is not None and rival.difference.mean == pytest.approx(0.06)
    assert rival.verdict is PolicyVerdict.AHEAD


def test_sweep_and_what_it_carries(tmp_path: Path) -> None:
    e = read_experiment(write(tmp_path, swept()), "hocket")
    (sweep,) = sweeps(e)
    assert sweep.name == "rate" and sweep.xs == (6, 12, 18) and sweep.is_load
    loads = {c.series: c for c in carried(e, sweep, target=0.85)}
    assert loads["hocket"].load.value == pytest.approx(14.0)
    assert loads["edf"].load.value == pytest.approx(8.0)
    ratio = loads["edf"].ratio
    assert ratio is not None and ratio.value == pytest.approx(14 / 8)
    assert ratio.low < ratio.value < ratio.high


def test_paper_numbers_stand_beside_ours(tmp_path: Path) -> None:
    e = read_experiment(write(tmp_path, swept()), "hocket")
    found = compared(e)
    assert [c.paper.policy for c in found] == ["edf", "hocket", "hocket", "hocket", "unknown"]
    assert found[0].ours is not None and found[0].ours.mean == pytest.approx(0.81)
    assert found[1].ours is not None and found[1].ours.mean == pytest.approx(93 / 87, abs=1e-3)
    assert found[-1].ours is None
    report(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "Table 1 <draft>" in readme and "not run" in readme


def test_a_single_cell_a_single_seed_and_no_classes(tmp_path: Path) -> None:
    rows = [
        row({"workload": "burst"}, p, 4, m, classes={}, bound=None)
        for p, m in (("edf", 80), ("hocket", 90))
    ]
    folder = write(tmp_path, rows, case="")
    assert {p.name for p in report(folder)} == {"README.md", "report.html", "curves.png"}
    assert "one seed" in (folder / "README.md").read_text()
    well_formed(folder / "report.html")


def test_a_class_nobody_finishes(tmp_path: Path) -> None:
    starved = {CLASSES[0]: {"requests": 5, "met": 0, "latency_s": []}}
    rows = [row({}, "hocket", s, 50, classes=starved) for s in (0, 1)]
    folder = write(tmp_path, rows)
    report(folder)
    well_formed(folder / "report.html")
    assert "| **hocket** | **0.0 ± 0.0** | **–** |" in (folder / "README.md").read_text()


def test_a_folder_of_folders_gets_an_index(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, swept(rates=(6, 12)))
    written = report(tmp_path)
    assert tmp_path / "README.md" in written and tmp_path / "two/curves.png" in written
    assert "(two/README.md)" in (tmp_path / "README.md").read_text()
    well_formed(tmp_path / "report.html")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"has runs\.jsonl"):
        report(tmp_path)
    write(tmp_path, swept())
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"case": 1}\n')
    with pytest.raises(ReportError, match="line 28"):
        report(tmp_path)
    app = Typer()
    app.command()(report_command)
    assert CliRunner().invoke(app, [str(tmp_path)]).exit_code == 2
