"""Solves a relaxation with HiGHS and certifies what it says.

The linear optimum is not believed but bounded: for any row prices y of the right sign,
    max over low <= w <= high of y w,  plus the sum of max(0, (c - y A)_j) upper_j,
is at least the optimum (weak duality), so an inexact solver can only loosen the bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from .relaxation import Floats, Programme

INTERIOR_POINT_FROM = 15_000  # variables from which the interior point method is the faster one


class SolverFailed(RuntimeError):
    """HiGHS gave no answer to a programme that always has one (all zeros)."""


class Linear(NamedTuple):
    """Requests on time, as bounded by row prices, and each one's share x."""

    certified: float
    solved: float
    shares: Floats

    @property
    def whole(self) -> bool:
        """Whether every x is 0 or 1: then integrality adds nothing."""
        return bool(np.all(np.abs(self.shares - np.round(self.shares)) < 1e-6))


class Whole(NamedTuple):
    """The solver's bound on requests on time with x in {0, 1}."""

    bounded: float
    optimal: bool  # False: time ran out, the bound is valid but not tight


def solve_linear(p: Programme) -> Linear:
    """The linear relaxation. Raises: SolverFailed."""
    matrix, c = _matrix(p), p.objective
    equal = np.isfinite(p.low)
    found = linprog(
        -c,
        A_ub=matrix[~equal],
        b_ub=p.high[~equal],
        A_eq=matrix[equal],
        b_eq=p.high[equal],
        bounds=np.column_stack([np.zeros_like(p.upper), p.upper]),
        method="highs-ipm" if len(c) > INTERIOR_POINT_FROM else "highs-ds",
    )
    if found.status != 0:
        raise SolverFailed(str(found.message))
    prices = np.empty(len(p.high))
    prices[~equal] = -found.ineqlin.marginals
    prices[equal] = -found.eqlin.marginals
    certified = min(weak_dual(p, prices), float(p.requests))
    return Linear(certified, -float(found.fun), np.asarray(found.x[: p.requests]))


def weak_dual(p: Programme, prices: Floats) -> float:
    """An upper bound on the optimum from any row prices."""
    prices = np.where(np.isinf(p.low), np.maximum(prices, 0.0), prices)
    rows = np.where(prices >= 0.0, p.high, np.where(np.isinf(p.low), 0.0, p.low))
    reduced = p.objective - _matrix(p).T @ prices
    return float(prices @ rows + np.maximum(reduced, 0.0) @ p.upper)


def solve_whole(p: Programme, seconds: float) -> Whole | None:
    """The mixed-integer relaxation within a time limit; None without a finite bound."""
    c = p.objective
    found = milp(
        -c,
        constraints=LinearConstraint(_matrix(p), p.low, p.high),
        bounds=Bounds(np.zeros_like(p.upper), p.upper),
        integrality=c,
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    dual = found.mip_dual_bound
    if dual is None or not math.isfinite(dual):
        return None
    return Whole(-float(dual), found.status == 0)


def _matrix(p: Programme) -> csr_array:
    shape = (len(p.high), len(p.upper))
    return csr_array((p.entries, (p.rows, p.columns)), shape=shape)
