"""A device that is broken for this process: whatever it is asked, it fails from now on.

CUDA errors are sticky (an illegal address, a lost device): the context is gone, and only a new
process has another one. A worker that went on would fail everything it is given, at once, and
therefore be the first that is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hocket.errors import HocketError

_SAID = ("CUDA error:", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")


@dataclass
class DeviceBroken(HocketError):
    """The device's context is gone; the process ends. `cause`: what was said first."""

    cause: str

    def __str__(self) -> str:
        return f"the device is broken for this process: {self.cause}"


def is_broken(error: BaseException | None) -> bool:
    """Whether an error says so; one that says that memory ran out does not."""
    while error is not None:
        said = isinstance(error, torch.AcceleratorError) or (
            isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
        )
        if said and "out of memory" not in str(error):
            return True
        error = error.__cause__
    return False
