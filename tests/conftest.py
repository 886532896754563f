"""Fixtures that every test folder can use."""

pytest_plugins = ["tests.fixtures_nats"]
