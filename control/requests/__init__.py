"""Requests beyond what the scheduler knows of them: their lives, answers, followers."""

from control.requests.records import Record, Records

__all__ = ["Record", "Records"]
