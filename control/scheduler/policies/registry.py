"""The policies by name. To add one: a module with a class like `Fixed`, and a line here; or, from
another package, an entry point of the group `hocket.policies` that leads to a `Registered`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ..settings import SettingError, Settings, read_policy_settings
from .base import EventPolicy, Planner, Policy, Registered
from .diflow import DiFlow
from .disagfusion import DisagFusion
from .edf import EdfBestFit, EdfGreedy
from .fixed import Fixed
from .genserve import GenServe
from .hocket.planner import Hocket
from .tetriserve import TetriServe

GROUP = "hocket.policies"
OURS: Mapping[str, Registered] = {
    **{f"fixed-{k}": Registered(Fixed.SPECS, Fixed.of_degree(k)) for k in (1, 2, 4, 8)},
    "diflow": Registered(DiFlow.SPECS, DiFlow.made),
    "disagfusion": Registered(DisagFusion.SPECS, DisagFusion.made),
    "edf-greedy": Registered(EdfGreedy.SPECS, EdfGreedy.made),
    "edf": Registered(EdfBestFit.SPECS, EdfBestFit.made),
    "genserve": Registered(GenServe.SPECS, GenServe.made),
    "hocket": Registered(Hocket.SPECS, Hocket),
    "tetriserve": Registered(TetriServe.SPECS, TetriServe.made),
}


def names() -> tuple[str, ...]:
    """All policies, in order of their names."""
    return tuple(sorted({*OURS, *_others()}))


def find(name: str) -> Registered:
    """How a policy is made. Raises: SettingError, where there is none of that name."""
    if name in OURS:
        return OURS[name]
    other = _others().get(name)
    if other is None:
        raise SettingError("policy", name, " | ".join(names()))
    try:
        found = other.load()
    except (ImportError, AttributeError) as error:
        raise SettingError("policy", name, f"installed whole: {other.value}: {error}") from error
    if not isinstance(found, Registered):
        raise SettingError("policy", name, f"a Registered, which {other.value} is not")
    return found


def make_policy(settings: Settings) -> Policy | EventPolicy | Planner:
    """The policy that the settings name. Raises: SettingError."""
    made = find(settings.policy)
    read = read_policy_settings(settings.policy, made.specs, settings.policy_settings)
    return made.make(settings, read)


@cache
def _others() -> Mapping[str, EntryPoint]:
    return {found.name: found for found in entry_points(group=GROUP)}
