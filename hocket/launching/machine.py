"""What kind of machine a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_kind() -> str:
    """CPU model, cores and Python, in one line; no names, no addresses."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, load {load:.1f}"
    )
