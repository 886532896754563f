"""Calls of torch's own attention, met on their way: for processors that ask no registry.

While a step runs, `OnTheWay` hands each call to the elastic layer; what an attention module is
called with says what the call runs over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Layer(Protocol):
    """What the elastic layer does with them."""

    def met(
        self, attention: Any, query: Tensor, key: Tensor, value: Tensor, **others: Any
    ) -> Tensor:
        """One call, [B, H, tokens here, D]."""

    def within(self, reach: Reach) -> AbstractContextManager[None]:
        """Attention inside is a module's, of which `reach` is known."""


class Reach(Enum):
    """What an attention module runs over."""

    OWN = "own"  # the stream of its own queries
    JOINT = "joint"  # that and the text, which is split too
    ACROSS = "across"  # this member's queries, and the whole of another sequence


class OnTheWay(TorchFunctionMode):
    """Meets a model's calls of torch's attention, [B, H, tokens here, D]."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = layer

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return self._layer.met(function, *args, **kwargs)


def watch_attention(model: nn.Module, layer: Layer) -> None:
    """Says of each of diffusers' attention modules what it runs over, while it runs."""
    for module in model.modules():
        if hasattr(module, "is_cross_attention"):
            module.forward = _watched(module, layer)


def _watched(module: nn.Module, layer: Layer) -> Callable[..., Any]:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        reach = Reach.OWN if text is None else Reach.JOINT
        with layer.within(Reach.ACROSS if module.is_cross_attention else reach):
            return inner(*args, **kwargs)

    return forward
