"""The settings of a call, as a workflow has them. Without torch.

Control has checked them against the workflow; here they are read once more, since what arrives from
the bus may have been made by anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.struct_pb2 import Value

from gpuworker.operations.names import OperationRefused


class Settings:
    """Of one call. All of it raise `OperationRefused` for what a setting cannot be."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values and self._values[name].WhichOneof("kind") != "null_value"

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        if name not in self:
            return default
        value = self._values[name]
        number = value.number_value
        if value.WhichOneof("kind") != "number_value" or not low <= number <= high:
            raise OperationRefused(f"settings.{name}", _shown(value), f"{low:g}..{high:g}")
        return number

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        number = self.number(name, default, low, high)
        if number != int(number):
            raise OperationRefused(f"settings.{name}", number, f"whole numbers {low}..{high}")
        return int(number)

    def word(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """One of the words that are allowed."""
        if name not in self:
            return default
        value = self._values[name]
        if value.string_value not in allowed:
            raise OperationRefused(f"settings.{name}", _shown(value), ", ".join(allowed))
        return value.string_value


def _shown(value: Value) -> str:
    """A value in few characters."""
    return str(getattr(value, value.WhichOneof("kind") or "null_value"))[:64]
