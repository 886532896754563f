"""Resolution-aware static parallelism, RASP (GENSERVE, arXiv 2604.04335v1, section 6.1).

    video: 256p -> 1, 480p -> 2, 720p -> 4 (squares of 256, 480, 768 pixels)      image: 1

As RSSP with another table. The paper leaves open what RSSP's does: `queue` (by deadline is the
better one in the paper's own workload, too), `overtake`, other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from control.scheduler.settings import Spec
from control.scheduler.values import Request

from .rssp import Rssp


class Rasp(Rssp):
    """A degree by pixels for videos; pictures on one worker."""

    NAME = "rasp"
    SPECS: ClassVar[Mapping[str, Spec]] = {
        **Rssp.SPECS,
        "degrees": Spec("256=1,480=2,768=4"),
    }

    def degree(self, request: Request) -> int:
        return super().degree(request) if request.shape.frames > 1 else 1
