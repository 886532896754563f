"""The command line: what it prints and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from control.__main__ import main as control
from control.scheduler.policies import registry
from gateway.__main__ import main as gateway
from gpuworker.__main__ import main as gpuworker
from hocket.cli.__main__ import app
from hocket.cli.common import pixels, seconds
from hocket.cli.demo import DemoRequest, step_runs, summary
from hocket.cli.generate import (
    Format,
    commitment,
    farewell,
    frames_offered,
    media_type,
    named_size,
    replaced_words,
    shape_name,
    target,
)
from hocket.cli.up import POLICIES
from hocket.errors import MeshStopped, WrongConfig
from hocket.launching import endpoints
from hocket.launching.launcher import MeshPlan, worker_options
from hocket.v1.generation_pb2 import Accepted, Finished, FrameCounts, ModelInfo, Progress
from hocket.v1.types_pb2 import Commitment, MediaInfo, Shape
from tests.hocket.test_trace_view import CONTROL, GATEWAY, WORKER

COMMANDS = {"up", "demo", "generate", "watch", "result", "ls", "models", "status", "drain"}
COMMANDS |= {"cancel", "trace", "timeline"}


def hocket(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    texts = {"gateway-0": GATEWAY, "control-0": CONTROL, "gpuworker-w0": WORKER}
    for name, text in texts.items():
        (folder / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_help_names_every_policy() -> None:
    assert len(POLICIES) == len(set(POLICIES)) and set(POLICIES) == set(registry.names())
    _, told = hocket("up", "--help")
    assert "disagfusion" in told


def test_while_nobody_leads_it_says_who_stands_by(tmp_path: Path) -> None:
    endpoints.announce(tmp_path, "control", "127.0.0.1:1", endpoints.STANDBY)
    status, told = hocket("status", f"--state-dir={tmp_path}")
    assert status == 1 and told.startswith("NOT_READY: none of the control replicas here leads")
    assert "127.0.0.1:1 (pid" in told and "standby)" in told


def test_a_mesh_passes_its_batches_on() -> None:
    status, told = hocket("up", "--batch-max", "64", "--help")
    assert status in (0, 2) and "--batch-max" in told
    options = worker_options(MeshPlan(Path("state"), 2, batch_max=4))
    assert "--batch-max=4" in options
    assert not any("batch" in o for o in worker_options(MeshPlan(Path("state"), 2)))


def test_every_command_is_there() -> None:
    status, told = hocket("--help")
    assert status == 0
    for name in [
        "up",
        "demo",
        "generate",
        "models",
        "status",
        "drain",
        "cancel",
        "trace",
        "timeline",
    ]:
        assert name in told


@pytest.mark.parametrize(
    ("command", "service"),
    [
        (["generate", "a fox"], "gateway"),
        (["models"], "gateway"),
        (["status"], "control"),
        (["drain", "w0"], "control"),
        (["cancel", "r1"], "gateway"),
    ],
)
def test_without_a_mesh_it_says_how_to_start_one(
    command: list[str], service: str, tmp_path: Path
) -> None:
    status, told = hocket(*command, "--state-dir", str(tmp_path))
    assert status == 1
    assert f"no {service} is running here" in told and "run `hocket up`" in told


def test_a_gateway_that_does_not_answer_is_told(tmp_path: Path) -> None:
    status, told = hocket("models", "--address", "127.0.0.1:1", "--state-dir", str(tmp_path))
    assert status == 1 and "GATEWAY_UNREACHABLE" in told


def test_trace_prints_the_timeline(state_dir: Path) -> None:
    status, told = hocket("trace", "r1", "--state-dir", str(state_dir))
    assert status == 0
    assert "request r1, trace t1" in told and "dit 2/2 x2 [w0 w1]" in told


def test_trace_without_a_name_shows_the_last_request(state_dir: Path) -> None:
    assert "request r2" in hocket("trace", "--state-dir", str(state_dir))[1]


def test_trace_of_an_unknown_request(state_dir: Path) -> None:
    status, told = hocket("trace", "nobody", "--state-dir", str(state_dir))
    assert status == 1 and "no request 'nobody' is known here" in told


def test_timeline_writes_a_file(state_dir: Path) -> None:
    file = state_dir / "t.json"
    status, _ = hocket("timeline", "-o", str(file), "--state-dir", str(state_dir))
    assert status == 0 and b"thread_name" in file.read_bytes()


def test_timeline_as_a_page(state_dir: Path) -> None:
    file = state_dir / "t.html"
    status, _ = hocket("timeline", "-o", str(file), "--state-dir", str(state_dir))
    page = file.read_text()
    assert status == 0 and "<svg" in page and ">w0</text>" in page


@pytest.mark.parametrize(
    ("text", "length_s"), [("5", 5.0), ("5s", 5.0), ("800ms", 0.8), ("1.5m", 90.0), ("3us", 3e-6)]
)
def test_durations(text: str, length_s: float) -> None:
    assert seconds("--deadline", text) == pytest.approx(length_s)


def test_a_wrong_duration_or_size_is_told() -> None:
    with pytest.raises(WrongConfig, match="--deadline"):
        seconds("--deadline", "soon")
    with pytest.raises(WrongConfig, match="WIDTHxHEIGHT"):
        pixels("--size", "big")
    assert pixels("--size", "128X64") == (128, 64)


def test_sizes_have_names() -> None:
    shapes = [Shape(width=s, height=s) for s in (128, 64, 256)]
    assert [named_size(n, shapes)[0] for n in ("small", "medium", "large")] == [64, 128, 256]
    with pytest.raises(MeshStopped):
        named_size("small", [])


def test_a_video_is_named_with_its_frames() -> None:
    assert shape_name(Shape(width=128, height=64, frames=1)) == "128x64"
    assert shape_name(Shape(width=832, height=480, frames=81, fps=16)) == "832x480x81@16"
    assert shape_name(Shape(width=832, height=480, frames=81)) == "832x480x81"


def frame_counts(*numbers: int) -> FrameCounts:
    least, most, multiple, offset, default = numbers
    return FrameCounts(
        minimum=least, maximum=most, multiple=multiple, offset=offset, default_count=default
    )


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (ModelInfo(shapes=[Shape(width=64, height=64)]), ""),
        (ModelInfo(shapes=[Shape(width=64, height=64, frames=n) for n in (81, 33)]), "33 81"),
        (ModelInfo(frames=frame_counts(1, 121, 4, 1, 81)), "1-121, 4k+1 (81)"),
        (ModelInfo(frames=frame_counts(2, 16, 2, 0, 16)), "2-16, 2k (16)"),
        (ModelInfo(frames=frame_counts(2, 16, 1, 0, 8)), "2-16 (8)"),
        (ModelInfo(frames=frame_counts(49, 49, 8, 1, 49)), "49"),
    ],
)
def test_frames_are_listed_in_brief(info: ModelInfo, told: str) -> None:
    assert frames_offered(info) == told


def test_a_replaced_prompt_is_named() -> None:
    told = replaced_words("a wyvern", "a dragon")
    assert told == "no 'wyvern' in this model's vocabulary; showing 'a dragon'"
    assert replaced_words("A  Red Fox", "a red fox") == ""
    assert replaced_words("a dog", "a dog bouncing") == "showing 'a dog bouncing'"


def test_step_runs_are_compressed() -> None:
    steps = [Progress(step=k, steps=8, degree=1, workers=["w0"]) for k in range(1, 4)]
    steps += [Progress(step=k, steps=8, degree=2, workers=["w0", "w1"]) for k in range(4, 8)]
    steps += [Progress(step=8, steps=8, degree=1, workers=["w3"])]
    assert step_runs(steps) == "steps 1-3 x1 [w0], 4-7 x2 [w0 w1], 8 x1 [w3]"
    assert step_runs([]) == "no steps seen"


def test_a_summary_says_what_a_person_wants_to_know() -> None:
    shape = Shape(width=128, height=128)
    run = DemoRequest(
        "a fox", shape, 4.0, accepted=Accepted(request_id="r1"), path=Path("out/r1.png")
    )
    run.finished = Finished(latency_us=2_000_000, predicted_latency_us=1_500_000, on_time=True)
    told = summary(run)
    for part in ("128x128 'a fox'", "r1", "predicted 1.50 s, took 2.00 s", "kept", "out/r1.png"):
        assert part in told
    run.finished.on_time = False
    assert "MISSED" in summary(run)


def test_the_last_lines_of_generate() -> None:
    accepted = Accepted(request_id="r1", predicted_latency_us=1_000_000)
    finished = Finished(latency_us=1_200_000, on_time=True, degree_changes=2)
    told = farewell(accepted, finished, Path("x.png"))
    assert "took 1.20 s, predicted 1.00 s, on time, 2 degree changes" in told
    assert "hocket trace r1" in told


def test_results_are_named_by_request_and_kind() -> None:
    video = MediaInfo(media_type="video/mp4")
    assert target(None, "r1", video) == Path("out/r1.mp4")
    assert target(Path("x"), "r1", video) == Path("x")
    assert target(None, "r1", MediaInfo(media_type="image/webp")) == Path("out/r1.webp")
    assert target(None, "r1", MediaInfo(media_type="image/png")) == Path("out/r1.png")


@pytest.mark.parametrize(
    ("made", "output", "asked_for"),
    [
        (None, None, ""),
        (None, "fox", ""),
        (None, "fox.jpg", ""),
        (None, "waves.MP4", "video/mp4"),
        (None, "fox.png", "image/png"),
        (Format.WEBP, None, "image/webp"),
        (Format.WEBP, "waves.mp4", "image/webp"),
        (Format.MP4, "fox", "video/mp4"),
    ],
)
def test_a_format_is_told_or_named_by_the_file(
    made: Format | None, output: str | None, asked_for: str
) -> None:
    assert media_type(made, Path(output) if output else None) == asked_for


def test_soft_is_asked_for_only_where_it_was_said() -> None:
    told = (commitment(None), commitment(firm=False), commitment(firm=True))
    assert told == (
        Commitment.COMMITMENT_UNSPECIFIED,
        Commitment.COMMITMENT_SOFT,
        Commitment.COMMITMENT_FIRM,
    )


@pytest.mark.parametrize(
    ("app", "section"), [(gateway, "gateway"), (control, "control"), (gpuworker, "gpuworker")]
)
def test_help_names_the_table_of_the_settings_file(app: Callable[..., None], section: str) -> None:
    one = typer.Typer()
    one.command()(app)
    told = CliRunner().invoke(one, ["--help"], env={"COLUMNS": "200"}).output
    assert f"[{section}] table" in told


def test_generate_tells_its_formats() -> None:
    status, told = hocket("generate", "--help")
    assert status == 0 and "--fps" in told and "--frames" in told and "png|webp|mp4" in told
    assert hocket("generate", "waves", "--format", "gif")[0] == 2
    assert hocket("generate", "waves", "--fps", "-1")[0] == 2
    assert hocket("generate", "waves", "--frames", "-1")[0] == 2
