"""A worker's claim to its name on this host.

A worker empties its folder of spilled latents when it starts. Another process of the same name and
state folder, which control refuses a moment later, must not do that to the one that lives: the
claim is a lock, which the system takes back from a process that dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuworker.mesh.naming import NameRefused


@contextmanager
def claimed(folder: Path, worker: str) -> Iterator[Path]:
    """The worker's own folder in `folder`, as long as this process is in here.

    Raises `NameRefused`: another living process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{worker}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"another living process of this name uses {folder / worker}"
            raise NameRefused(worker, why) from None
        yield folder / worker
