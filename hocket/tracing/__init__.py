"""Spans: written, found again, drawn."""
