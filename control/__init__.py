"""The control plane: the live shell around the scheduler library.

The planner is compiled at its first use and kept beside its sources. Where that folder cannot be
written (a system-wide installation, a read-only image), importing the planner would fail, so this
says first where to keep it: in the user's cache, else in a folder that goes with the process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def _writable(folder: Path) -> bool:
    """Whether files can be made there, tried as numba tries it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


_OF_THIS_PROCESS: tempfile.TemporaryDirectory[str] | None = None
if not _writable(Path(__file__).parent / "scheduler/policies/hocket/__pycache__"):
    _cache = Path(os.path.expanduser("~/.cache/hocket/compiled"))
    if not _writable(_cache):
        _OF_THIS_PROCESS = tempfile.TemporaryDirectory(prefix="hocket-compiled-")
        _cache = Path(_OF_THIS_PROCESS.name)
    os.environ.setdefault("NUMBA_CACHE_DIR", str(_cache))
