"""The table family by property, with the largest difference from the stock pipeline's latents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

COLUMNS = {
    "test_every_layout": "degrees",
    "test_random_schedules": "random schedules",
    "test_preempted_and_resumed_elsewhere": "preempt, resume",
    "test_a_batch_of_four": "batch of 4",
    "test_loaded_from_its_folder": "save, load",
    "test_another_number_of_frames": "frames",
    "test_a_number_of_frames_between_is_refused": "bad frames refused",
    "test_heads_that_do_not_divide_are_refused_before_the_kernel": "bad degree refused",
}
ERROR = "latent error"  # name of the property that a test records
_FILE = "test_families.py::"


@dataclass
class Cell:
    """What became of one family's tests of one kind."""

    settings: list[str] = field(default_factory=list)  # degrees or seeds that passed
    failed: int = 0
    error: float | None = None  # the largest one recorded

    def __str__(self) -> str:
        if self.failed:
            return f"{self.failed} FAILED"
        which = " ".join(sorted(self.settings)) or "ok"
        return which if self.error is None else f"{which} ({self.error:.0e})"


class FamilyTable:
    """Listens to a test run; writes the table under it."""

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, Cell]] = defaultdict(lambda: defaultdict(Cell))

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Enters a test of a family."""
        if _FILE not in report.nodeid or (report.when != "call" and not report.failed):
            return
        test, _, rest = report.nodeid.split(_FILE, 1)[1].partition("[")
        family, setting = _split(rest.removesuffix("]"))
        cell = self._cells[family][COLUMNS.get(test, test)]
        if report.failed:
            cell.failed += 1
        elif report.passed:
            cell.settings += [setting] if setting else []
            errors = [float(str(v)) for k, v in report.user_properties if k == ERROR]
            cell.error = max([e for e in (cell.error, *errors) if e is not None], default=None)

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Writes the table, where families were tested."""
        if not self._cells:
            return
        terminalreporter.section("families: what passed (largest latent error)")
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> Iterator[str]:
        """Header, then a line a family."""
        names = list(COLUMNS.values())
        yield "".join(f"{name:<20}" for name in ("family", *names)).rstrip()
        for family, cells in sorted(self._cells.items()):
            told = (str(cells[name]) if name in cells else "-" for name in names)
            yield "".join(f"{cell:<20}" for cell in (family, *told)).rstrip()


def _split(parameters: str) -> tuple[str, str]:
    """("wan-unipc", "2") of "wan-unipc-2" or of "2-wan-unipc"."""
    pieces = parameters.split("-")
    for place in (0, -1):
        if pieces[place].isdigit():
            setting = pieces.pop(place)
            return "-".join(pieces), setting
    return parameters, ""
