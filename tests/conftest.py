"""Fixtures that every test folder can use."""

from hypothesis import settings

pytest_plugins = ["tests.fixtures_nats"]

# The same examples on every run; `pytest --hypothesis-profile=hunt` draws others each time.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("hunt", deadline=None)
settings.load_profile("same")
