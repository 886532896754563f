"""The analytic form of a call's time, for cells that nobody profiled.

    t = launch + linear * bv/d + quadratic * bv²/d + [d > 1] (collectives + traffic * bv (d-1)/d)
        ╰──────────── compute, shared by d ──────╯   ╰────────── what sharing costs ────────────╯

with v the pixels x frames of one result (tokens are in proportion), b the batch, d the degree. All
coefficients are non-negative; they are fitted to relative errors with Huber's weights, so that one
odd cell bends nothing. What the form misses is corrected by the residuals of the cells around, the
nearest first. Same cells, same numbers: iteration counts are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .profile import CellKey

Floats = NDArray[np.float64]

CELLS_MIN = 4  # fewer say too little for a fit
TERMS = 5
ROUNDS = 8  # of reweighting
HUBER = 0.05  # relative error beyond which a cell loses weight
NEAR = 0.05  # softens the weight of the nearest cell; squared octaves
RIDGE = 1e-9
LEAST = 0.1  # of the nearest cell's time, where the form loses all sense
_WORK = np.array([1.0, -1.0, 1.0])  # octaves of size, degree and batch to octaves of work
_SUBSETS = np.array([[m >> i & 1 for i in range(TERMS)] for m in range(1, 1 << TERMS)], bool)


class CallForm:
    """One family's form, fitted once. Needs CELLS_MIN cells; times are microseconds."""

    def __init__(self, cells: Mapping[CellKey, float]) -> None:
        assert len(cells) >= CELLS_MIN, "estimate_from asks for a form only where there are enough"
        keys = sorted(cells)
        times_us = np.array([cells[k] for k in keys], float)
        volumes = np.array([volume(k) for k in keys])
        self._scale = float(np.median(volumes))
        self._low, self._high = float(volumes.min()), float(volumes.max())
        self._degrees = {k.layout.degree for k in keys}
        self._batches = {k.batch for k in keys}
        self._octaves = np.log2(_axes(volumes, keys))
        self._terms = np.array([self._row(k) for k in keys])
        self._fit = _fit(self._terms / times_us[:, None])
        self._times_us = times_us
        self._residuals = np.log(times_us / np.maximum(self._terms @ self._fit, 1e-9))

    def covers(self, key: CellKey) -> bool:
        """The size lies between known ones (beyond them the form is no better than a guess), and
        several degrees or batches are known where another one is asked for.
        """
        return (
            self._low <= volume(key) <= self._high
            and (len(self._degrees) > 1 or key.layout.degree in self._degrees)
            and (len(self._batches) > 1 or key.batch in self._batches)
        )

    def call_us(self, key: CellKey) -> float:
        """The form's time, corrected by what it misses at the cells around; never a small part of
        what the nearest cell's share of such work takes.
        """
        here = np.log2(_axes(np.array([volume(key)]), [key]))
        squared = ((self._octaves - here) ** 2).sum(axis=1)
        weights = 1.0 / (NEAR + squared) ** 2
        missed = float((weights * self._residuals).sum() / weights.sum())
        nearest = int(np.argmin(squared))
        fewer_octaves = min(0.0, float((here - self._octaves[nearest])[0] @ _WORK))
        least_us = LEAST * float(self._times_us[nearest]) * float(2.0**fewer_octaves)
        return max(least_us, float(self._row(key) @ self._fit) * float(np.exp(missed)))

    def _row(self, key: CellKey) -> Floats:
        size, degree = volume(key) / self._scale, key.layout.degree
        work = key.batch * size
        shared = float(degree > 1)
        return np.array(
            [1.0, work / degree, work * size / degree, shared, work * (degree - 1) / degree]
        )


def volume(key: CellKey) -> float:
    """Pixels x frames of one result: what tokens grow with."""
    return float(key.shape.width * key.shape.height * key.shape.frames)


def _axes(volumes: Floats, keys: list[CellKey]) -> Floats:
    return np.array([[v, k.layout.degree, k.batch] for v, k in zip(volumes, keys, strict=True)])


def _fit(rows: Floats) -> Floats:
    """Non-negative x for which `rows @ x` is about 1, by reweighted least squares.

    The best of all sets of terms whose solution has no negative one: with five terms that is
    cheaper than a search, and ends after a known number of steps.
    """
    weights = np.ones(len(rows))
    fit = np.zeros(TERMS)
    for _ in range(ROUNDS):
        fit = _non_negative(rows * weights[:, None], weights)
        errors = np.abs(rows @ fit - 1.0)
        weights = np.sqrt(np.minimum(1.0, HUBER / np.maximum(errors, 1e-9)))
    return fit


def _non_negative(rows: Floats, wanted: Floats) -> Floats:
    gram, right = rows.T @ rows, rows.T @ wanted
    both = _SUBSETS[:, :, None] & _SUBSETS[:, None, :]
    ridge = RIDGE * float(np.trace(gram)) * np.eye(TERMS)
    systems = np.where(both, gram + ridge, np.where(_SUBSETS[:, :, None], 0.0, np.eye(TERMS)))
    solved = np.linalg.solve(systems, np.where(_SUBSETS, right, 0.0)[:, :, None])[:, :, 0]
    # What is left of |rows x - wanted|², but for a constant; fewer terms win a tie.
    losses = np.einsum("si,ij,sj->s", solved, gram, solved) - 2.0 * solved @ right
    losses += 1e-7 * len(rows) * _SUBSETS.sum(axis=1)
    losses[(solved < 0.0).any(axis=1)] = np.inf
    best: Floats = solved[int(np.argmin(losses))]
    return best
