"""Settings: what wins over what, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from msgspec import Meta

from hocket.config import Common, load, load_or_exit
from hocket.errors import WrongConfig


class Some(Common, frozen=True, kw_only=True):
    section: ClassVar[str] = "control"

    policy: Literal["fixed", "tetriserve"] = "tetriserve"
    rounds: Annotated[int, Meta(ge=1, le=64)] = 8
    share: float = 0.5
    models: tuple[str, ...] = ()
    fast: bool = False
    folder: Path | None = None
    files: tuple[Path, ...] = ()


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "hocket.toml"
    file.write_text(text)
    return file


def test_defaults() -> None:
    assert load(Some, {}) == Some()


def test_option_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, 'cluster = "east"\n[control]\nrounds = 3\npolicy = "fixed"\n')
    monkeypatch.setenv("HOCKET_ROUNDS", "4")
    assert load(Some, {"rounds": 5}, file).rounds == 5
    assert load(Some, {"rounds": None}, file).rounds == 4
    monkeypatch.delenv("HOCKET_ROUNDS")
    found = load(Some, {}, file)
    assert (found.rounds, found.policy, found.cluster) == (3, "fixed", "east")


def test_an_option_may_be_several_paths() -> None:
    """`python -m control --profile FILE` refused its own option."""
    assert load(Some, {"files": (Path("a"), Path("b"))}).files == (Path("a"), Path("b"))


def test_a_table_wins_over_the_top_level_and_other_tables_are_not_ours(tmp_path: Path) -> None:
    text = 'cluster = "east"\n[control]\ncluster = "west"\n[gateway]\nlisten = "x"\n'
    assert load(Some, {}, written(tmp_path, text)).cluster == "west"


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOCKET_CONFIG", str(written(tmp_path, "[control]\nshare = 0.25\n")))
    assert load(Some, {}).share == 0.25


def test_text_becomes_what_the_field_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"MODELS": "a, b", "FAST": "true", "STATE_DIR": "/x", "FOLDER": "y"}.items():
        monkeypatch.setenv(f"HOCKET_{name}", text)
    found = load(Some, {})
    assert found.models == ("a", "b") and found.fast
    assert (found.state_dir, found.folder) == (Path("/x"), Path("y"))


@pytest.mark.parametrize(
    ("options", "key", "value", "allowed"),
    [
        ({"policy": "best"}, "--policy", "best", "fixed, tetriserve"),
        ({"rounds": 0}, "--rounds", "0", "an integer of at least 1 and at most 64"),
        ({"rounds": "many"}, "--rounds", "many", "an integer"),
        ({"share": "half"}, "--share", "half", "a number"),
        ({"fast": "perhaps"}, "--fast", "perhaps", "true or false"),
        ({"cluster": "North East"}, "--cluster", "North East", "a string matching"),
        ({"log_level": "loud"}, "--log-level", "loud", "debug, error, info, warning"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(
    options: dict[str, object], key: str, value: str, allowed: str
) -> None:
    with pytest.raises(WrongConfig) as caught:
        load(Some, options)
    assert (caught.value.key, caught.value.value) == (key, value)
    assert allowed in caught.value.allowed


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOCKET_POLICY", "best")
    with pytest.raises(WrongConfig, match="HOCKET_POLICY"):
        load(Some, {})


@pytest.mark.parametrize(
    "text", ["rouds = 1\n", "[control]\nrouds = 1\n", "[control]\nrounds = 99\n", "not toml"]
)
def test_a_wrong_file_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(WrongConfig):
        load(Some, {}, written(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WrongConfig, match="readable"):
        load(Some, {}, tmp_path / "none.toml")


def test_a_wrong_setting_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit(Some, {"policy": "best"})
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "--policy" in told and "'best'" in told and "tetriserve" in told
