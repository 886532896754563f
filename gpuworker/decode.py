"""One job's decode. A first one that runs out of memory fails, for everything else to make room and
for the estimate to be raised: the next may then have the whole picture. One that runs out again
goes on in smaller tiles at once, whose seams differ a little, rather than fail the request.
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from gpuworker.memory import ran_out
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState

log = logging.getLogger(__name__)


def decoded(card: ModelCard, state: LatentState, *, smaller: bool) -> NDArray[np.uint8]:
    """The pictures of a finished state; in `smaller` tiles where the whole is too much.

    Raises whatever the decoder raises: of memory, only when the smallest tiles took too much.
    """
    tiles = card.smaller_tiles() if smaller else iter(())
    ways: Iterator[AbstractContextManager[None] | None]
    ways = itertools.chain((nullcontext(),), tiles, (None,))
    for way, after in itertools.pairwise(ways):
        assert way is not None
        try:
            with way:
                return card.decode(state)
        except Exception as error:
            if not ran_out(error):
                raise
            _free(card, error)
            if after is None:
                raise
            log.warning("%s: no memory for a decode; on in smaller tiles", card.facts.name)
    raise AssertionError("the last way returns or raises")


def _free(card: ModelCard, error: Exception) -> None:
    """What the failed decode had made lives in its frames, and in the decoder."""
    traceback.clear_frames(error.__traceback__)
    card.forget_decode()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
