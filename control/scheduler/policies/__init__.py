"""The policies by name. To add one: a module with a class like `Fixed`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from ..settings import SettingError, Settings, read_policy_settings
from .base import Candidate, Choice, Policy, PolicyClass
from .fixed import Fixed
from .tetriserve import TetriServe

REGISTRY: Mapping[str, PolicyClass] = {"fixed": Fixed, "tetriserve": TetriServe}


def make_policy(settings: Settings) -> Policy:
    """The policy that the settings name. Raises: SettingError."""
    made = REGISTRY.get(settings.policy)
    if made is None:
        raise SettingError("policy", settings.policy, " | ".join(REGISTRY))
    read = read_policy_settings(settings.policy, made.SPECS, settings.policy_settings)
    return made(read, settings.straddle)


__all__ = ["REGISTRY", "Candidate", "Choice", "Policy", "make_policy"]
