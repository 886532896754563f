"""API keys: whose they are, what they refuse, how they change under a running gateway."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.access import Access
from hocket.cli.__main__ import app
from hocket.clock import ManualClock
from hocket.errors import AccessDenied, NotAuthenticated, WrongConfig
from hocket.security import api_keys


def bearer(secret: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {secret}")]


def test_without_a_file_everybody_says_who_they_are() -> None:
    access = Access(None, ManualClock())
    assert access.tenant([]) is None
    assert access.named([], "acme") == "acme"


def test_a_key_speaks_for_its_tenant_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, acme = api_keys.add(file, "acme")
    _, other = api_keys.add(file, "other")
    access = Access(file, ManualClock())
    assert access.tenant(bearer(acme)) == "acme"
    assert access.tenant([("x-api-key", other)]) == "other"
    assert access.named(bearer(acme), "") == "acme"
    assert access.named(bearer(acme), "acme") == "acme"
    with pytest.raises(AccessDenied, match="other"):
        access.named(bearer(acme), "other")
    for wrong in ([], bearer(""), bearer("hk_wrong"), [("authorization", acme)]):
        with pytest.raises(NotAuthenticated):
            access.tenant(wrong)


def test_what_operators_do_takes_an_operators_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secrets = {}
    for options in (["acme"], ["house", "--operator"]):
        told = CliRunner().invoke(app, ["keys", "add", *options, "--file", str(file)])
        assert told.exit_code == 0, told.output
        secrets[options[0]] = told.stdout.strip()
    access = Access(file, ManualClock())
    access.operator(bearer(secrets["house"]), "RegisterWorkflow")
    assert access.tenant(bearer(secrets["house"])) == "house"
    with pytest.raises(AccessDenied, match="'acme' may not use RegisterWorkflow"):
        access.operator(bearer(secrets["acme"]), "RegisterWorkflow")
    for wrong in ([], bearer("hk_wrong")):
        with pytest.raises(NotAuthenticated):
            access.operator(wrong, "RegisterWorkflow")
    Access(None, ManualClock()).operator([], "RegisterWorkflow")
    listed = CliRunner().invoke(app, ["keys", "list", "--file", str(file)]).output
    assert listed.count("operator") == 1
    assert file.read_text().count("operator") == 1, "as older gateways read it, but for operators"


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, secret = api_keys.add(file, "acme")
    assert secret not in file.read_text() and secret.removeprefix("hk_") not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_owner_and_mode_of_the_file_stay(tmp_path: Path) -> None:
    """A gateway of another user, or group, goes on reading it."""
    file = tmp_path / "keys.json"
    name, _ = api_keys.add(file, "acme")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 12_345, 12_346)
    before = file.stat()
    api_keys.add(file, "other")
    api_keys.revoke(file, name)
    after = file.stat()
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert after.st_mode == before.st_mode
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_many_who_add_keys_at_once_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as threads:
        added = list(threads.map(lambda i: api_keys.add(file, f"t{i}"), range(64)))
    known = api_keys.read(file)
    assert {known.tenant_of(secret) for _, secret in added} == {f"t{i}" for i in range(64)}


def test_keys_change_without_a_restart(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.json", ManualClock()
    name, old = api_keys.add(file, "acme")
    access = Access(file, clock)
    _, new = api_keys.add(file, "acme")
    assert access.tenant(bearer(old)) == "acme"
    with pytest.raises(NotAuthenticated):
        access.tenant(bearer(new))  # looks once a second
    clock.advance_to(clock.now_us() + 1_000_000)
    assert access.tenant(bearer(new)) == "acme"
    api_keys.revoke(file, name)
    clock.advance_to(clock.now_us() + 1_000_000)
    with pytest.raises(NotAuthenticated):
        access.tenant(bearer(old))
    file.write_text("{")  # half a file: the keys stay
    clock.advance_to(clock.now_us() + 1_000_000)
    assert access.tenant(bearer(new)) == "acme"


def test_bad_files_and_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(WrongConfig, match="api_keys"):
        Access(tmp_path / "none.json", ManualClock())
    with pytest.raises(WrongConfig, match="tenant"):
        api_keys.add(tmp_path / "keys.json", "two words")
    api_keys.add(tmp_path / "keys.json", "acme")
    with pytest.raises(WrongConfig, match="id"):
        api_keys.revoke(tmp_path / "keys.json", "nobody")
