"""What a call takes that nobody has measured yet, from cells that are known.

In turn: the cell itself; the analytic form of its family (`call_form.py`), where it has cells
enough and the size lies between theirs; else what the nearest relatives suggest: a batch scaled
linearly, another degree of the same shape (narrower: linear; wider: by the square root), another
shape.
Which of them is better where, `python -m bench latency` measures by leaving cells out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from ..settings import Settings
from ..values import DIT, TEXT, VAE, Layout, Shape
from .call_form import CELLS_MIN, CallForm
from .profile import CellKey, Family, Profile, by_degree

Cells = Mapping[CellKey, float]
WEIGHTLESS_US = 5_000  # a call that needs no weights: of up to a megapixel, then of each
KIN = {"encode_image": VAE}  # operations that take about what another of their part does


class Estimator:
    """Estimates from one profile; the form of each family is fitted once."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        self.profile = profile
        self._settings = settings
        self._forms: dict[Family, CallForm | None] = {}

    def estimate_us(self, key: CellKey) -> float:
        """Time of a call by the profile alone.

        A GPU kind that was not profiled is as slow as the slowest known one of the model. A model
        that has no row at all costs `default_step_us` a call, whatever its shape; a call without
        weights `WEIGHTLESS_US` a megapixel.
        """
        cell_us = self.profile.call_us(key)
        if cell_us is not None:
            return cell_us
        if not key.model:
            return WEIGHTLESS_US * max(1.0, _volume(key.shape)) * key.batch
        gpus = self.profile.gpus(key.model)
        default_step_us = self._settings.default_step_us
        if not gpus:
            gain = 1.0 if key.node != DIT else _gain(key.layout.degree)
            return default_step_us * key.batch / gain
        kinds = (key.gpu,) if key.gpu in gpus else gpus
        found = [self._there_us(by_degree(key)._replace(gpu=gpu)) for gpu in kinds]
        known = [us for us in found if us is not None]
        if not known and key.node in KIN:
            return self.estimate_us(key._replace(node=KIN[key.node]))
        return max(known) if known else default_step_us * key.batch

    def _there_us(self, key: CellKey) -> float | None:
        family: Family = key[:3]
        cells = self.profile.family(family)
        if key in cells:
            return cells[key]
        if family not in self._forms:
            self._forms[family] = fitted(cells)
        return estimate_from(cells, self._forms[family], key)


def estimate_from(cells: Cells, form: CallForm | None, key: CellKey) -> float | None:
    """Time of a call that is not among a family's cells; None where these say nothing."""
    if form is not None and form.covers(key):
        return form.call_us(key)
    return from_relatives(cells, key)


def fitted(cells: Cells) -> CallForm | None:
    """The form of a family, where it has cells enough."""
    return CallForm(cells) if len(cells) >= CELLS_MIN else None


def from_relatives(cells: Cells, key: CellKey) -> float | None:
    """What the nearest cells of a family suggest; None where they say nothing."""
    if not cells:
        return None
    if batches := [k.batch for k in cells if k._replace(batch=key.batch) == key]:
        nearest = min(batches, key=lambda b: (abs(b - key.batch), b))
        return cells[key._replace(batch=nearest)] * key.batch / nearest
    if same := {k.layout: t for k, t in cells.items() if k.shape == key.shape and k.batch == 1}:
        return _from_degrees(same, key.layout.degree) * key.batch
    sizes = {k.shape: t for k, t in cells.items() if k.layout == key.layout and k.batch == 1}
    if sizes:
        return _from_sizes(sizes, key) * key.batch
    nearest_cell = min(cells, key=lambda k: (abs(k.layout.degree - key.layout.degree), k))
    like = {
        k.shape: t for k, t in cells.items() if k.layout == nearest_cell.layout and k.batch == 1
    }
    if not like:
        return None
    here_us = _from_sizes(like, key)
    return _from_degrees({nearest_cell.layout: here_us}, key.layout.degree) * key.batch


def _gain(degree: int) -> float:
    return float(degree**0.5)


def _from_degrees(times_us: Mapping[Layout, float], degree: int) -> float:
    layout = min(times_us, key=lambda x: (abs(x.degree - degree), x))
    known_us, known = float(times_us[layout]), layout.degree
    if degree <= known:
        return known_us * known / degree
    return known_us / _gain(degree) * _gain(known)


def _volume(shape: Shape) -> float:
    return shape.width * shape.height * shape.frames / 1e6


def _from_sizes(times_us: Mapping[Shape, float], key: CellKey) -> float:
    """A call at an unseen size, from calls at others.

    A prompt is as long whatever is made of it: a text call takes what it takes at the nearest size.
    Other nodes, between two sizes: on the line that joins them. Beyond: floor + linear + quadratic
    in pixels x frames, put through the nearest size, where three sizes allow a sane fit; else that
    size scaled linearly, and never below a tenth of it.
    """
    x = _volume(key.shape)
    if key.node == TEXT:
        return min((abs(_volume(s) - x), float(us)) for s, us in times_us.items())[1]
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
