"""The example units start services with options they take, and restart as `hocket up` does."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gateway.__main__ import main as gateway
from gateway.scaler import PoolSelector
from gpuworker.__main__ import app as gpuworker
from hocket.errors import InvalidRequest
from hocket.launching.restarts import DEFAULT
from hocket.v1.control_pb2 import PoolStatus

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))


def read(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_restarts_as_the_launcher_does(unit: Path) -> None:
    read_unit = read(unit)
    service = read_unit["Service"]
    assert service["Restart"] == "always"
    assert service["RestartSec"] == f"{DEFAULT.first_s * 1000:.0f}ms"
    assert service["RestartMaxDelaySec"] == f"{DEFAULT.longest_s:.0f}s"
    assert int(read_unit["Unit"]["StartLimitBurst"]) == DEFAULT.most
    assert int(read_unit["Unit"]["StartLimitIntervalSec"]) == DEFAULT.window_s


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_units_variables_are_set(unit: Path) -> None:
    used = set(re.findall(r"\$\{?([A-Z_]+)\}?", read(unit)["Service"]["ExecStart"]))
    lines = (FOLDER / "hocket.env").read_text().splitlines()
    assert used <= {line.partition("=")[0] for line in lines}


@pytest.mark.parametrize("module", ["control", "gateway", "gpuworker"])
def test_a_service_takes_its_units_options(module: str) -> None:
    import typer

    from control.__main__ import main as control

    if module == "gpuworker":
        app = gpuworker
    else:
        app = typer.Typer()
        app.command()(control if module == "control" else gateway)
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    (unit,) = [u for u in UNITS if f"-m {module}" in u.read_text()]
    words = shlex.split(read(unit)["Service"]["ExecStart"])
    options = [word for word in words if word.startswith("--")]
    assert options and all(option in told for option in options)


def test_the_scaled_object_asks_what_a_gateway_answers() -> None:
    text = (FOLDER.parent / "kubernetes/scaledobject.yaml").read_text()
    (trigger,) = yaml.safe_load(text)["spec"]["triggers"]
    assert trigger["type"] == "external-push"
    asked = PoolSelector.of(trigger["metadata"])
    assert asked.gpu and asked.wanted([PoolStatus(gpu=asked.gpu, wanted=3)]) == 3
    named = re.findall(r"# (\w+): ", text.partition("metadata:\n        scaler")[2])
    assert set(named) >= {"model", "minWorkers", "maxWorkers", "apiKeyFromEnv"}
    assert PoolSelector.of({"minWorkers": "1"}).wanted([]) == 1
    for wrong in (
        {"minWorkers": "-1"},
        {"maxWorkers": "x"},
        {"minWorkers": "3", "maxWorkers": "2"},
    ):
        with pytest.raises(InvalidRequest, match=r"scalerMetadata\.m"):
            PoolSelector.of(wrong)
