"""A CA and every role's certificates, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hocket.security.certificates import make_all
from hocket.security.identity import Identity


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_all(folder, ["gateway.example", "10.1.2.3"], days=2)
    return folder


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names under another CA."""
    folder = tmp_path_factory.mktemp("strangers")
    make_all(folder, [], days=2)
    return folder


def identity(folder: Path, role: str) -> Identity:
    found = Identity.load(folder / role)
    assert found is not None
    return found
