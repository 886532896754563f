"""The latency model: what one call takes, as a mean and as a safe quantile.

    profile cell, or an estimate where there is none   x   ratio of measured to predicted, by cell
                                                           (an unmeasured cell borrows its kin's)

The ratio is the median of the last few measured ones, begun with two ones: a single outlier moves
nothing, three equal measurements outvote the profile. Deadline arithmetic uses the safe quantile,
which skips the largest sample of a window for the same reason. Same facts, same numbers: no clock
and no random. Version 0 of DESIGN.md section 5.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from .profile import CellKey, Profile
from .settings import Settings
from .values import DIT, Layout, Shape

WINDOW = 15  # measured ratios kept a cell
PRIOR = (1.0, 1.0)
RATIO_MIN, RATIO_MAX = 0.05, 20.0
KEPT_MAX = 65_536  # predictions kept until what they rest on changes

Family = tuple[str, str, str]  # model, gpu, node
Call = tuple[str, Shape, str, int, tuple[str, ...], int]  # model .. node, degree, gpus, batch


class Prediction(NamedTuple):
    """Time of one call in microseconds."""

    mean_us: int
    safe_us: int


class CellSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A refined cell as a plain value; ratios oldest first."""

    model: str
    gpu: str
    node: str
    shape: Shape
    layout: Layout
    batch: int
    profile_us: int
    mean_us: int
    safe_us: int
    ratios: tuple[float, ...]


class LatencyModel:
    """Predicts calls and learns from their reports."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        self._profile = profile
        self._settings = settings
        self._ratios: dict[CellKey, tuple[float, ...]] = {}
        self._base_us: dict[CellKey, int] = {}
        self._predictions: dict[CellKey, Prediction] = {}
        self._calls: dict[Call, Prediction] = {}
        self._calls_of: dict[CellKey, dict[Call, None]] = {}  # what a cell's prediction went into
        # Without a measurement of their own, predicted from their kin's.
        self._borrowers: dict[Family, dict[CellKey, None]] = {}
        self._middles: dict[Family, dict[Shape, dict[CellKey, float]]] = {}  # of measured cells
        self.version = 0  # counts the times that a prediction was taken back

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

    def observe(self, key: CellKey, call_us: int) -> None:
        """One measured call."""
        ratio = min(RATIO_MAX, max(RATIO_MIN, call_us / self._base(key)))
        before = self._ratios.get(key, PRIOR)
        ratios = (*before, ratio)[-WINDOW:]
        if ratios != before:
            self._learn(key, ratios)

    def snapshot(self) -> tuple[CellSnapshot, ...]:
        """All refined cells, sorted; `restore` takes them back."""
        return tuple(
            CellSnapshot(
                **key._asdict(),
                profile_us=self._base(key),
                mean_us=self.predict(key).mean_us,
                safe_us=self.predict(key).safe_us,
                ratios=ratios,
            )
            for key, ratios in sorted(self._ratios.items())
        )

    def restore(self, cells: tuple[CellSnapshot, ...]) -> None:
        """Takes over what an earlier model had learned."""
        for c in cells:
            key = CellKey(c.model, c.gpu, c.node, c.shape, c.layout, c.batch)
            self._learn(key, tuple(c.ratios)[-WINDOW:])

    def _predict(self, key: CellKey) -> Prediction:
        ratios = self._ratios.get(key)
        if ratios is not None:
            return self._measured(key, sorted(ratios))
        self._borrowers.setdefault(key[:3], {})[key] = None
        mean_us = max(1, round(self._base(key) * self._borrowed(key)))
        return Prediction(mean_us, round(mean_us * self._settings.safe_factor))

    def _measured(self, key: CellKey, ordered: list[float]) -> Prediction:
        base_us = self._base(key)
        mean = base_us * ordered[len(ordered) // 2]
        # floor: never the largest of two or more, unless the quantile is 1
        safe = base_us * ordered[int(self._settings.safe_quantile * (len(ordered) - 1))]
        return Prediction(max(1, round(mean)), max(1, round(max(mean, safe))))

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

    def _learn(self, key: CellKey, ratios: tuple[float, ...]) -> None:
        """Takes back the predictions that the ratios change, and no others."""
        self._ratios[key] = ratios
        ordered = sorted(ratios)
        family = key[:3]
        self._borrowers.get(family, {}).pop(key, None)
        known = self._predictions.get(key)
        if known is not None:
            prediction = self._measured(key, ordered)
            if prediction != known:
                self._take_back(key)
                self._predictions[key] = prediction
        measured = self._middles.setdefault(family, {})
        cells = measured.setdefault(key.shape, {})
        middle = ordered[len(ordered) // 2]
        if cells.get(key) == middle:
            return
        cells[key] = middle
        borrowers = self._borrowers.get(family, {})
        for other in [b for b in borrowers if b.shape == key.shape or b.shape not in measured]:
            del borrowers[other]
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

    def _base(self, key: CellKey) -> int:
        base_us = self._base_us.get(key)
        if base_us is None:
            base_us = self._base_us[key] = max(
                1, round(estimate_us(self._profile, key, self._settings))
            )
        return base_us


def estimate_us(profile: Profile, key: CellKey, settings: Settings) -> float:
    """Time of a call by the profile alone: its cell, else what its nearest relatives suggest.

    In turn: another GPU kind of the same model (the slowest known one), a batch scaled linearly,
    another degree of the same shape (narrower: linear; wider: by the square root), another shape. A
    model that has no row at all costs `default_step_us` a call, whatever its shape.
    """
    cell_us = profile.call_us(key)
    if cell_us is not None:
        return cell_us
    gpus = profile.gpus(key.model)
    if not gpus:
        return (
            settings.default_step_us
            * key.batch
            / (1 if key.node != DIT else _gain(key.layout.degree))
        )
    kinds = (key.gpu,) if key.gpu in gpus else gpus
    found = [
        t for gpu in kinds if (t := _from_relatives(profile, key._replace(gpu=gpu))) is not None
    ]
    return max(found) if found else settings.default_step_us * key.batch


def _gain(degree: int) -> float:
    return float(degree**0.5)


def _from_relatives(profile: Profile, key: CellKey) -> float | None:
    cells = profile.select(key.model, key.gpu, key.node)
    if not cells:
        return None
    if key in cells:
        return float(cells[key])
    if batches := [k.batch for k in cells if k._replace(batch=key.batch) == key]:
        nearest = min(batches, key=lambda b: (abs(b - key.batch), b))
        return cells[key._replace(batch=nearest)] * key.batch / nearest
    if same := {k.layout: t for k, t in cells.items() if k.shape == key.shape and k.batch == 1}:
        return _from_degrees(same, key.layout.degree) * key.batch
    sizes = {k.shape: t for k, t in cells.items() if k.layout == key.layout and k.batch == 1}
    if sizes:
        return _from_sizes(sizes, key.shape) * key.batch
    nearest_cell = min(cells, key=lambda k: (abs(k.layout.degree - key.layout.degree), k))
    like = {
        k.shape: t for k, t in cells.items() if k.layout == nearest_cell.layout and k.batch == 1
    }
    if not like:
        return None
    here_us = _from_sizes(like, key.shape)
    return _from_degrees({nearest_cell.layout: here_us}, key.layout.degree) * key.batch


def _from_degrees(times_us: dict[Layout, float] | dict[Layout, int], degree: int) -> float:
    layout = min(times_us, key=lambda x: (abs(x.degree - degree), x))
    known_us, known = float(times_us[layout]), layout.degree
    if degree <= known:
        return known_us * known / degree
    return known_us / _gain(degree) * _gain(known)


def _volume(shape: Shape) -> float:
    return shape.width * shape.height * shape.frames / 1e6


def _from_sizes(times_us: dict[Shape, int], shape: Shape) -> float:
    """A call at an unseen size, from calls at others.

    Between two sizes: on the line that joins them. Beyond: floor + linear + quadratic in pixels x
    frames, put through the nearest size, where three sizes allow a sane fit; else that size scaled
    linearly, and never below a tenth of it.
    """
    x = _volume(shape)
    points = sorted((_volume(s), float(t)) for s, t in times_us.items())
    for (x0, t0), (x1, t1) in pairwise(points):
        if x0 <= x <= x1 and x0 < x1:
            return t0 + (t1 - t0) * (x - x0) / (x1 - x0)
    near_x, near_us = points[0] if x <= points[0][0] else points[-1]
    if len({v for v, _ in points}) >= 3:
        xs = np.array([v for v, _ in points])
        ys = np.array([t for _, t in points])
        terms = np.stack([np.ones_like(xs), xs, xs * xs], axis=1)
        fit, *_ = np.linalg.lstsq(terms / ys[:, None], np.ones_like(ys), rcond=None)
        if (fit >= 0).all():
            here, there = (float(fit @ np.array([1.0, v, v * v])) for v in (x, near_x))
            return near_us * here / there
    return near_us * max(0.1, x / near_x)
