"""`python -m gpuworker.measuring.facts`: what this machine is, and what can be measured here, as
one JSON object. No names of hosts. Apart from the sections: it must not pay for their imports.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import Any

import torch

MODELS = ("flux.1-dev", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
TINY_MODELS = ("tiny-flux", "tiny-wan")


def facts() -> dict[str, Any]:
    """Kind of device, and versions."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }
    if not torch.cuda.is_available():
        return found | {"device": "cpu", "count": 1}
    nccl: Any = torch.cuda.nccl
    return found | {
        "device": torch.cuda.get_device_name(0),
        "count": torch.cuda.device_count(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())),
    }


if __name__ == "__main__":
    print(json.dumps({"device": facts(), "models": MODELS, "tiny": TINY_MODELS}))
