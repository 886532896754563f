"""The scheduler's settings: one frozen value, checked when built.

A wrong setting stops the process with the key, the value and what is allowed (`SettingError`). What
the published systems leave open is a setting here or one of a policy's own (`policies/`), never a
constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

SettingValue = str | bool | int | float


class SettingError(ValueError):
    """A setting has a value that is not allowed, or a name that nobody knows."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"setting {key} = {value!r}: allowed is {allowed}")
        self.key = key
        self.value = value
        self.allowed = allowed


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to plan. Durations are microseconds."""

    policy: str = "tetriserve"  # name in `policies.registry`
    policy_settings: dict[str, SettingValue] = {}
    rounds: bool = True  # False: every event is a planning point with a window of one round
    amend: bool = True  # inside a round, idle workers take waiting jobs at events
    round_us: int = 0  # length of a round; 0: derived from step_granularity
    step_granularity: int = 5  # steps of the slowest shape, at its fastest, in one round
    round_us_min: int = 10_000
    round_us_max: int = 10_000_000
    lead_us: int = 0  # a round is planned this long before its boundary
    straddle: float = 0.8  # part of a step that must fit into the window for it to start there
    epoch_base: int = 1  # first epoch of every group; a new leader passes a higher one
    safe_factor: float = 1.02  # safe over mean step time where nothing was measured yet
    safe_quantile: float = 0.9  # of measured step times
    default_step_us: int = 1_000_000  # of a model without any profile row, at degree 1
    failures_max: int = 3  # failures at one place, for reasons other than workers, end a request
    group_change_us: int = 0  # a job that goes on on other workers, until reports say
    group_cold_us: int = 0  # a group that forms for the first time, until reports say
    straggler_factor: float = 1.2  # a worker so much slower than its peers is slow; 0: none is
    straggler_avoid: float = 1.5  # from here on it costs its groups more than it gives: avoided
    straggler_retry_us: int = 10_000_000  # it is tried again after so long, then twice that …
    quarantine_failures: int = 3  # that others do not share keep a worker out; 0: never
    quarantine_retry_us: int = 5_000_000  # it is tried again after so long, then twice that …
    hung_after_factor: float = 8.0  # of its predicted span an assignment may take; 0: for ever
    hung_min_us: int = 5_000_000  # … but never less than this
    stages_ahead: int = 8  # encode and decode jobs that a worker is given at a time

    def __post_init__(self) -> None:
        for key, low, high in (
            ("round_us", 0, 3_600_000_000),
            ("step_granularity", 1, 1_000),
            ("round_us_min", 1, 3_600_000_000),
            ("round_us_max", self.round_us_min, 3_600_000_000),
            ("lead_us", 0, 60_000_000),
            ("straddle", 0.0, 1.0),
            ("epoch_base", 0, 2**62),
            ("safe_factor", 1.0, 10.0),
            ("safe_quantile", 0.5, 1.0),
            ("default_step_us", 1, 3_600_000_000),
            ("failures_max", 1, 1_000),
            ("stages_ahead", 1, 1_000_000),
            ("group_change_us", 0, 3_600_000_000),
            ("group_cold_us", 0, 3_600_000_000),
            ("straggler_avoid", 1.0, 100.0),
            ("straggler_retry_us", 1, 3_600_000_000),
            ("quarantine_failures", 0, 1_000),
            ("quarantine_retry_us", 1, 3_600_000_000),
            ("hung_after_factor", 0.0, 1_000.0),
            ("hung_min_us", 1, 3_600_000_000),
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not low <= value <= high:
                raise SettingError(key, value, f"{low}..{high}")
        factor = self.straggler_factor
        if isinstance(factor, bool) or not (factor == 0 or 1.05 <= factor <= 100):
            raise SettingError("straggler_factor", factor, "0 (never), or 1.05..100")


@dataclass(frozen=True, slots=True)
class Spec:
    """One policy setting: default (which gives the type), and the values or the range allowed."""

    default: SettingValue
    allowed: tuple[SettingValue, ...] = ()
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.allowed:
            return " | ".join(str(a) for a in self.allowed)
        if isinstance(self.default, bool):
            return "true | false"
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{type(self.default).__name__} {low}..{high}"

    def read(self, key: str, value: SettingValue) -> SettingValue:
        """The value in the setting's own type. Raises: SettingError."""
        wanted = type(self.default)
        if isinstance(value, bool) != (wanted is bool) or isinstance(value, str) != (wanted is str):
            raise SettingError(key, value, str(self))
        if wanted is int and isinstance(value, float) and value != int(value):
            raise SettingError(key, value, str(self))
        read: SettingValue = wanted(value)
        if self.allowed and read not in self.allowed:
            raise SettingError(key, value, str(self))
        if not isinstance(read, str) and self.low is not None and read < self.low:
            raise SettingError(key, value, str(self))
        if not isinstance(read, str) and self.high is not None and read > self.high:
            raise SettingError(key, value, str(self))
        return read


def read_policy_settings(
    policy: str, specs: Mapping[str, Spec], given: Mapping[str, SettingValue]
) -> dict[str, SettingValue]:
    """All of a policy's settings: those given, checked, and the defaults of the others.

    Raises:
        SettingError: an unknown key or a value that is not allowed.
    """
    for key in given:
        if key not in specs:
            raise SettingError(f"{policy}.{key}", given[key], f"one of {', '.join(specs)}")
    return {
        key: spec.read(f"{policy}.{key}", given[key]) if key in given else spec.default
        for key, spec in specs.items()
    }
