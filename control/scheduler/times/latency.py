"""The latency model: what one call takes, as a mean and as a safe quantile.

    profile cell, or an estimate where there is none (estimate.py)
      x  what was measured against it, cell by cell: the median of the last few ratios
      x  for the quantile: how far the slow ones among them lie above it, the fewer the cell's own
         measurements the more as in its family (model, GPU kind, node)

A window begins with two ratios of what was believed before, so that a single outlier moves nothing
and three equal measurements outvote the profile. A cell without measurements borrows: a profiled
one the ratio of its kin, another an estimate from all cells as they are now, so that a new
resolution, once measured, tells of those near it. When a whole family gets slower or faster for
good (`drift.py`), its windows begin anew at the new level. What one worker does
(`stragglers.py`) is kept out: a worker known to be slow teaches the model nothing.

Same facts, same numbers: no clock and no random. What is measured as estimated changes nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..settings import Settings
from ..values import Layout, Shape
from .call_form import CallForm
from .cells import Cell, CellSnapshot, FamilySnapshot, LatencySnapshot
from .drift import SPREAD_UNKNOWN, FamilyState, Sample, Shift
from .estimate import Estimator, estimate_from, fitted
from .profile import CellKey, Family, Profile

RATIO_MIN, RATIO_MAX = 0.05, 20.0
KEPT_MAX = 65_536  # predictions kept until what they rest on changes
CELLS_MAX = 16_384  # measured cells; those not measured for longest go first
SNAPSHOT_CELLS_MAX = 1024  # those measured last
OWN_WEIGHT = 5  # so many own measurements count as much as the family's
GRID = 0.01  # of log ratios: what is nearer is the same to a form

Call = tuple[str, Shape, str, int, tuple[str, ...], int]  # model .. node, degree, gpus, batch


class Prediction(NamedTuple):
    """Time of one call in microseconds."""

    mean_us: int
    safe_us: int


class LatencyModel:
    """Predicts calls and learns from their reports."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        self._profile = profile
        self._settings = settings
        self._estimator = Estimator(profile, settings)
        self._cells: dict[CellKey, Cell] = {}  # measured; the one measured last is last
        self._families: dict[Family, FamilyState] = {}
        self._base_us: dict[CellKey, int] = {}
        self._predictions: dict[CellKey, Prediction] = {}
        self._calls: dict[Call, Prediction] = {}
        self._calls_of: dict[CellKey, dict[Call, None]] = {}  # what a cell's prediction went into
        # Without a measurement of their own, predicted from their kin's.
        self._borrowers: dict[Family, dict[CellKey, None]] = {}
        self._middles: dict[Family, dict[Shape, dict[CellKey, float]]] = {}  # of measured cells
        self._known: dict[Family, tuple[dict[CellKey, float], CallForm | None]] = {}
        self.version = 0  # counts the times that a prediction was taken back
        self.learned = 0  # counts the measurements that changed something

    # ------------------------------------------------------------------------------ questions

    def predict(self, key: CellKey) -> Prediction:
        """The time of one call; never fails: what nobody profiled is estimated."""
        known = self._predictions.get(key)
        if known is None:
            if len(self._predictions) >= KEPT_MAX:
                self._forget_all()
            known = self._predictions[key] = self._predict(key)
        return known

    def predict_call(self, call: Call) -> Prediction:
        """One call on a group with these GPU kinds: the slowest member sets the pace."""
        known = self._calls.get(call)
        if known is None:
            model, shape, node, degree, gpus, batch = call
            layout = Layout(ulysses=degree)
            keys = [CellKey(model, gpu, node, shape, layout, batch) for gpu in gpus]
            if max(len(self._calls), len(self._predictions) + len(keys)) >= KEPT_MAX:
                self._forget_all()  # now, and not between the members
            each = [self.predict(key) for key in keys]
            known = Prediction(max(p.mean_us for p in each), max(p.safe_us for p in each))
            self._calls[call] = known
            for key in keys:
                self._calls_of.setdefault(key, {})[call] = None
        return known

    def judge(self, key: CellKey, call_us: int, group: tuple[str, ...]) -> Sample | None:
        """How a measurement compares with what other workers took in the same cell of late; None
        where they are too few to tell.
        """
        cell = self._cells.get(key)
        reference = None if cell is None else cell.reference(group)
        if reference is None:
            return None
        excess = math.log(self._ratio(key, call_us) / reference)
        return Sample(excess, self._families[key[:3]].spread)

    def spread(self, key: CellKey) -> float:
        """How far calls of the cell's family usually lie apart: of a log."""
        family = self._families.get(key[:3])
        return SPREAD_UNKNOWN if family is None else family.spread

    # ------------------------------------------------------------------------------ learning

    def observe(self, key: CellKey, call_us: int, group: tuple[str, ...] = ()) -> Shift | None:
        """One measured call of a group; returns the lasting shift of its family, if that ends the
        doubt about one.
        """
        ratio = self._ratio(key, call_us)
        cell = self._cells.pop(key, None)
        if cell is None:  # what was believed of it so far counts as two measurements
            cell = Cell(self.predict(key).mean_us / self._base(key))
        self._cells[key] = cell  # now the last one
        if len(self._cells) > CELLS_MAX:
            self._forget(next(iter(self._cells)))
        family = self._families.setdefault(key[:3], FamilyState())
        shift = None
        if cell.settled:
            before = family.known, self._tail(key[:3])
            shift = family.observe(math.log(ratio / cell.middle), key, ratio, group)
            if before != (family.known, self._tail(key[:3])):
                self._learn_family(key[:3])
        if cell.add(group, ratio):
            self._learn(key, cell)
        return None if shift is None else self._shift(key[:3], family, shift)

    def disown(self, worker: str) -> None:
        """Forgets what was measured with a worker, now that it is known to have been slow."""
        for key, cell in list(self._cells.items()):
            if cell.disown(worker):
                if cell.count:
                    self._learn(key, cell)
                else:
                    self._forget(key)  # nobody else ran it: it borrows, as before

    def snapshot(self) -> LatencySnapshot:
        """What was learned, as a plain value: the cells measured last, sorted."""
        newest = list(self._cells.items())[-SNAPSHOT_CELLS_MAX:]
        cells = tuple(
            CellSnapshot(
                **key._asdict(),
                profile_us=self._base(key),
                mean_us=self.predict(key).mean_us,
                safe_us=self.predict(key).safe_us,
                ratios=cell.ratios,
            )
            for key, cell in sorted(newest, key=lambda item: item[0])
        )
        families = tuple(
            FamilySnapshot(model=f[0], gpu=f[1], node=f[2], residuals=state.residuals)
            for f, state in sorted(self._families.items())
        )
        return LatencySnapshot(cells=cells, families=families)

    def restore(self, snapshot: LatencySnapshot) -> None:
        """Takes over what an earlier model had learned, whatever profile that started from."""
        for f in snapshot.families:
            self._families[f.model, f.gpu, f.node] = FamilyState(f.residuals)
        for c in snapshot.cells:
            key = CellKey(c.model, c.gpu, c.node, c.shape, c.layout, c.batch)
            base_us = self._base(key)
            factor = 1.0 if c.profile_us == base_us else c.profile_us / base_us
            self._families.setdefault(key[:3], FamilyState())
            self._cells[key] = Cell.of(tuple(r * factor for r in c.ratios))
            self._learn(key, self._cells[key])
        self._forget_all()

    # ------------------------------------------------------------------------------ predicting

    def _predict(self, key: CellKey) -> Prediction:
        cell = self._cells.get(key)
        if cell is not None:
            return self._measured(key, cell)
        family = key[:3]
        self._borrowers.setdefault(family, {})[key] = None
        mean_us = max(1, round(self._unmeasured_us(key)))
        tail = self._tail(family)
        return Prediction(mean_us, round(mean_us * max(self._settings.safe_factor, math.exp(tail))))

    def _measured(self, key: CellKey, cell: Cell) -> Prediction:
        mean_us = self._base(key) * cell.middle
        own = math.log(cell.quantile(self._settings.safe_quantile) / cell.middle)
        state = self._families.get(key[:3])
        if state is not None and state.known:
            tail = self._tail(key[:3])
            own = (cell.count * own + OWN_WEIGHT * tail) / (cell.count + OWN_WEIGHT)
        safe_us = mean_us * math.exp(max(0.0, own))
        return Prediction(max(1, round(mean_us)), max(1, round(safe_us)))

    def _unmeasured_us(self, key: CellKey) -> float:
        """By the family as it is known now, where the profile has no cell; else by the kin."""
        family = key[:3]
        profiled = self._profile.family(family)
        borrows = key in profiled or not self._middles.get(family)
        if borrows or (not profiled and self._profile.gpus(key.model)):
            return self._base(key) * self._borrowed(key)
        cells, form = self._known_cells(family)
        known_us = estimate_from(cells, form, key) if cells else None
        return self._base(key) * self._borrowed(key) if known_us is None else known_us

    def _known_cells(self, family: Family) -> tuple[dict[CellKey, float], CallForm | None]:
        """A family's cells as they are now: the profile's, corrected, and measured ones beside.

        Ratios are taken from a grid, so that a form is not fitted anew for every microsecond. Cells
        that are as estimated teach nothing, and change nothing.
        """
        known = self._known.get(family)
        if known is None:
            measured = {k: m for kin in self._middles[family].values() for k, m in kin.items()}
            profiled = self._profile.family(family)
            cells = {
                key: us * _on_grid(measured[key] if key in measured else self._borrowed(key))
                for key, us in profiled.items()
            }
            for key, middle in measured.items():
                if key not in profiled and (middle != 1.0 or not profiled):
                    cells[key] = self._base(key) * _on_grid(middle)
            known = self._known[family] = cells, fitted(cells)
        return known

    def _borrowed(self, key: CellKey) -> float:
        """The ratio of an unmeasured cell: what its measured relatives have in common.

        Without it, whatever was never tried looks better than it is on a machine that is slower
        than its profile, and jobs are widened for no gain. Other layouts of the same shape tell
        most; other shapes of the node are asked where there is none.
        """
        measured = self._middles.get(key[:3], {})
        same_shape = measured.get(key.shape)
        kin = [same_shape] if same_shape else list(measured.values())
        middles = sorted(middle for cells in kin for middle in cells.values())
        return middles[(len(middles) - 1) // 2] if middles else 1.0

    def _tail(self, family: Family) -> float:
        state = self._families.get(family)
        return state.tail(self._settings.safe_quantile) if state is not None else 0.0

    # ------------------------------------------------------------------------------ taking back

    def _learn(self, key: CellKey, cell: Cell) -> None:
        """Takes back the predictions that a changed window changes, and no others."""
        self.learned += 1
        family = key[:3]
        self._borrowers.get(family, {}).pop(key, None)
        self._renew(key, cell)
        measured = self._middles.setdefault(family, {})
        new_shape = key.shape not in measured
        cells = measured.setdefault(key.shape, {})
        before, middle = cells.get(key), cell.middle
        if before == middle:
            return
        cells[key] = middle
        teaches = before is None or new_shape or _on_grid(before) != _on_grid(middle)
        if teaches:
            self._known.pop(family, None)
        profiled = self._profile.family(family)
        borrowers = self._borrowers.get(family, {})
        for other in [
            b
            for b in borrowers
            if b.shape == key.shape or b.shape not in measured or (teaches and b not in profiled)
        ]:
            del borrowers[other]
            self._take_back(other)

    def _learn_family(self, family: Family) -> None:
        """The family's quantile is another one."""
        for key in [k for k in self._predictions if k[:3] == family]:
            cell = self._cells.get(key)
            if cell is not None:
                self._renew(key, cell)
            else:
                self._take_back(key)

    def _renew(self, key: CellKey, cell: Cell) -> None:
        known = self._predictions.get(key)
        if known is not None:
            prediction = self._measured(key, cell)
            if prediction != known:
                self._take_back(key)
                self._predictions[key] = prediction

    def _shift(self, family: Family, state: FamilyState, shift: Shift) -> Shift:
        """Begins all windows of a family anew, at the level to which it moved."""
        since = state.settle()
        self._learn_family(family)
        for key, cell in list(self._cells.items()):
            if key[:3] == family:
                cell.restart(shift.factor, [(g, r) for k, r, g in since if k == key])
                self._learn(key, cell)
        return shift

    def _forget(self, key: CellKey) -> None:
        """Drops the measurements of a cell."""
        del self._cells[key]
        kin = self._middles.get(key[:3], {})
        kin.get(key.shape, {}).pop(key, None)
        self._known.pop(key[:3], None)
        self._take_back(key)
        for other in self._borrowers.pop(key[:3], ()):
            self._take_back(other)

    def _take_back(self, key: CellKey) -> None:
        self.version += 1
        self._predictions.pop(key, None)
        for call in self._calls_of.pop(key, ()):
            self._calls.pop(call, None)

    def _forget_all(self) -> None:
        """All of it can be worked out again."""
        for kept in (self._predictions, self._calls, self._calls_of, self._borrowers):
            kept.clear()
        self._base_us.clear()
        self._known.clear()

    def _ratio(self, key: CellKey, call_us: int) -> float:
        return min(RATIO_MAX, max(RATIO_MIN, call_us / self._base(key)))

    def _base(self, key: CellKey) -> int:
        base_us = self._base_us.get(key)
        if base_us is None:
            base_us = self._base_us[key] = max(1, round(self._estimator.estimate_us(key)))
        return base_us


def _on_grid(ratio: float) -> float:
    return math.exp(round(math.log(ratio) / GRID) * GRID)
