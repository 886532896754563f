"""`python -m gpuworker profile`: a profile that control reads, measured without a broker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control.config import ControlSettings, profile_csv
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import Layout, Shape
from gpuworker.__main__ import app
from gpuworker.measuring.profile_command import INTERRUPTED, Row, as_csv
from hocket.errors import WrongConfig
from tests.waiting import until

COMMAND = (sys.executable, "-m", "gpuworker", "profile", "--device=cpu")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


async def started(*options: str, model: str = "hocket-emoji") -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND, model, *options, env=ENVIRONMENT, stderr=asyncio.subprocess.PIPE
    )


def read(path: Path) -> dict[CellKey, int]:
    """As control reads it, beside the shipped ones; only what is in the file."""
    own = set(Profile.from_csv(path.read_text()).cells)
    cells = Profile.from_csv(profile_csv(ControlSettings(profiles=(path,)))).cells
    return {key: us for key, us in cells.items() if key in own}


async def test_it_measures_nodes_degrees_and_batches(tmp_path: Path) -> None:
    out = tmp_path / "profile.csv"
    options = ("--sizes=64x64", "--degrees=1,2", "--batches=1,2", "--steps=2", "--busy=1")
    process = await started(*options, f"--output={out}")
    _, told = await process.communicate()
    assert process.returncode == 0, told.decode()
    cells = read(out)
    shape = Shape(width=64, height=64)
    found = {(k.node, k.layout.degree, k.batch) for k in cells if k.shape == shape}
    nodes = {(node, 1, batch) for node in ("text", "dit", "vae") for batch in (1, 2)}
    assert found == nodes | {("dit", 2, 1), ("dit", 2, 2)}
    assert all(us > 0 for us in cells.values())
    halves = [k for k in cells if k.layout.degree == 2]
    assert {k.layout for k in halves} == {Layout(cfg=2)}, "split as control splits it"
    assert "cores" in out.read_text(), "the kind of machine stands in the source column"


async def test_a_length_that_the_model_refuses_costs_its_own_cells_only(tmp_path: Path) -> None:
    """Both members of a group refuse it: the next cell hears neither of them."""
    out = tmp_path / "profile.csv"
    options = ("--sizes=64x64", "--frames=7,4", "--degrees=2", "--steps=1", "--busy=1")
    process = await started(*options, f"--output={out}", model="hocket-emoji-motion")
    _, told = await process.communicate()
    assert process.returncode == 0, told.decode()
    assert told.count(b"frames=7: allowed is 2..16") == 3, told.decode()
    shape = Shape(width=64, height=64, frames=4)
    cells = [key for key in Profile.from_csv(out.read_text()).cells if key.shape == shape]
    assert {(k.node, k.layout.degree) for k in cells} == {("text", 1), ("dit", 2), ("vae", 1)}
    assert len(out.read_text().splitlines()) == 4, "no other shape"


async def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "profile.csv"
    options = ("--sizes=64x64", "--degrees=1", "--busy=1", "--steps=2000")
    process = await started(*options, f"--output={out}")
    await until(out.exists)
    process.send_signal(signal.SIGINT)
    _, told = await process.communicate()
    assert process.returncode == INTERRUPTED and b"Traceback" not in told
    assert read(out)


def test_wrong_options_are_refused() -> None:
    for option in ("--sizes=64", "--degrees=0", "--batches=x"):
        result = CliRunner().invoke(app, ["profile", "hocket-emoji", option])
        assert result.exit_code == 2, result.output


def test_options_alone_still_mean_workers(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--executor=none", f"--state-dir={tmp_path}"])
    assert result.exit_code == 2 and "executor" in result.output


def test_layouts_are_told_only_where_they_are_not_ulysses() -> None:
    row: Row = dict(
        zip(
            ("model", "gpu", "node", "width", "height", "frames", "degree", "batch", "call_us"),
            ("m", "g", "dit", 8, 8, 1, 2, 1, 9),
            strict=True,
        )
    )
    plain = row | {"source": "s", "cfg": 1, "ulysses": 2, "ring": 1}
    assert "cfg" not in as_csv([plain])
    halves = plain | {"cfg": 2, "ulysses": 1}
    assert as_csv([plain, halves]).splitlines()[0].endswith("source,cfg,ulysses,ring")


def test_a_header_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("model,gpu\nm,g\n")
    with pytest.raises(WrongConfig, match=r"wrong\.csv"):
        profile_csv(ControlSettings(profiles=(wrong,)))
