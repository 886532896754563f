"""Fixtures that every test folder can use."""

import pytest
from hypothesis import settings

from control.scheduler.policies import registry
from hocket.cli.up import POLICIES

pytest_plugins = ["tests.fixtures_nats"]

# The same examples on every run; `pytest --hypothesis-profile=hunt` draws others each time.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("hunt", deadline=None)
settings.load_profile("same")


def pytest_sessionstart() -> None:
    """Tests over all policies would pass over fewer."""
    if missing := set(POLICIES).difference(registry.names()):
        told = f"the installation is older than this tree and lacks {', '.join(sorted(missing))}"
        pytest.exit(f"{told}: run `make setup`", returncode=3)
