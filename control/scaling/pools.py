"""All pools of a cluster: what is asked of each goes in, how many workers each wants comes out.

Pure. A pool is the workers of one kind of GPU that serve one model; beside these, each kind of GPU
as a whole is a pool, for workers that serve several models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from control.scaling.hysteresis import PoolScaler, Wanted
from control.scaling.need import Due, PoolDemand
from control.scaling.settings import ScalingSettings
from control.scheduler.outlook.demand import PoolWork

POOLS_MAX = 4_096  # those that nobody asked anything of for longest are forgotten first


class PoolKey(NamedTuple):
    """Names a pool; `model` is empty for all models of a kind of GPU."""

    model: str
    gpu: str


class Outcomes(NamedTuple):
    """Requests with a deadline that ended, or were refused as late."""

    decided: int
    missed: int


@dataclass(frozen=True, slots=True)
class PoolReading:
    """One pool at one moment."""

    key: PoolKey
    demand: PoolDemand
    wanted: Wanted


@dataclass(slots=True)
class Pools:
    """Every pool's memory."""

    settings: ScalingSettings
    _scalers: dict[PoolKey, PoolScaler] = field(default_factory=dict)  # the one asked last is last

    def step(
        self,
        works: Mapping[tuple[str, str], PoolWork],
        outcomes: Mapping[str, Outcomes],
        known: Mapping[str, tuple[str, ...]],
        now_us: int,
    ) -> tuple[PoolReading, ...]:
        """What each pool wants. `outcomes` are those since the step before, by model; `known` are
        kinds of GPU by model: such pools are told of even if nothing is asked of them.
        """
        keys = {PoolKey(*key) for key in works}
        keys.update(PoolKey(m, gpu) for m, gpus in known.items() for gpu in gpus)
        keys.update(PoolKey("", key.gpu) for key in tuple(keys))
        demands = {
            key: _demand(works.get(key), outcomes.get(key.model)) for key in keys if key.model
        }
        for gpu in {key.gpu for key in keys}:
            models = [demand for key, demand in demands.items() if key.gpu == gpu]
            demands[PoolKey("", gpu)] = _together(models, works.get(("", gpu)))
        return tuple(self._read(key, demands[key], now_us) for key in sorted(demands))

    def _read(self, key: PoolKey, demand: PoolDemand, now_us: int) -> PoolReading:
        scaler = self._scalers.pop(key, None) or PoolScaler(self.settings)
        self._scalers[key] = scaler
        while len(self._scalers) > POOLS_MAX:
            del self._scalers[next(iter(self._scalers))]
        return PoolReading(key, demand, scaler.step(demand, now_us))


def _demand(work: PoolWork | None, outcomes: Outcomes | None) -> PoolDemand:
    """Of one model. Where several kinds of GPU serve it, each is told of all outcomes."""
    told = outcomes or Outcomes(0, 0)
    if work is None:
        return PoolDemand(workers=0, decided=told.decided, missed=told.missed)
    return PoolDemand(
        workers=work.workers,
        arrived=work.arrived,
        arrived_us=round(work.arrived_us),
        due=[Due(*each) for each in work.due],
        requests=work.requests,
        with_deadline=work.with_deadline,
        late=work.late,
        decided=told.decided,
        missed=told.missed,
        waiting=work.waiting,
    )


def _together(models: Sequence[PoolDemand], whole: PoolWork | None) -> PoolDemand:
    """Of all models of a kind of GPU."""
    return PoolDemand(
        workers=0 if whole is None else whole.workers,
        arrived=sum(each.arrived for each in models),
        arrived_us=sum(each.arrived_us for each in models),
        due=[due for each in models for due in each.due],
        requests=sum(each.requests for each in models),
        with_deadline=sum(each.with_deadline for each in models),
        late=sum(each.late for each in models),
        decided=sum(each.decided for each in models),
        missed=sum(each.missed for each in models),
        waiting=sum(each.waiting for each in models),
    )
