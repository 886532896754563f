"""Published numbers that a Case names. Reports read them from here, too: see `bench.reporting`."""

from __future__ import annotations

import msgspec


class PaperRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published number, to stand beside ours in the cells that have at least these values."""

    policy: str  # label of a series
    value: float
    source: str
    cell: dict[str, str | float | int | bool] = {}  # {}: in all cells
    metric: str = "attainment"
    over: str = ""  # the value is a ratio over this policy's
    remark: str = ""
