"""The policies by name. To add one: a module with a class like `Fixed`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from ..settings import SettingError, Settings, read_policy_settings
from .base import Candidate, Choice, EventPolicy, Policy, Registered
from .fixed import Fixed
from .tetriserve import TetriServe

REGISTRY: Mapping[str, Registered] = {
    **{f"fixed-{k}": Registered(Fixed.SPECS, Fixed.of_degree(k)) for k in (1, 2, 4, 8)},
    "tetriserve": Registered(TetriServe.SPECS, TetriServe.made),
}


def make_policy(settings: Settings) -> Policy | EventPolicy:
    """The policy that the settings name. Raises: SettingError."""
    made = REGISTRY.get(settings.policy)
    if made is None:
        raise SettingError("policy", settings.policy, " | ".join(REGISTRY))
    read = read_policy_settings(settings.policy, made.specs, settings.policy_settings)
    return made.make(settings, read)


__all__ = ["REGISTRY", "Candidate", "Choice", "EventPolicy", "Policy", "Registered", "make_policy"]
