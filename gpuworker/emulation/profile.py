"""The call times by which emulated workers sleep."""

from __future__ import annotations

import csv
from collections.abc import Iterable

from hocket.errors import WrongConfig

Cell = tuple[str, str, int, int, int, int]  # model, node, width, height, frames, degree


def profile_cells(lines: Iterable[str], name: str) -> dict[Cell, int]:
    """Call times (µs) of batch 1, by cell, of a profile CSV; raises WrongConfig naming the line."""
    cells: dict[Cell, int] = {}
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            if int(row["batch"]) != 1:
                continue
            shape = (int(row["width"]), int(row["height"]), int(row["frames"]))
            cell = (row["model"], row["node"], *shape, int(row["degree"]))
            cells[cell] = int(row["call_us"])
        except (KeyError, ValueError) as error:
            raise WrongConfig(
                key="profile", value=f"{name}:{number}", allowed=f"a profile row ({error!r})"
            ) from error
    return cells
