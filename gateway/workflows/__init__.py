"""Workflows at the gateway: found by name, checked against a request, registered."""
