"""Workflows of requests, as the scheduler and the workers have them."""
