"""One job's decode. A first one that runs out of memory fails, for everything else to make room and
for the estimate to be raised: the next may then have the whole picture. One that runs out again
goes on in smaller tiles at once, whose seams differ a little, rather than fail the request. What
did not fit whole then begins with tiles the next times, and now and then with the whole again.
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gpuworker.memory.budget import ran_out
from gpuworker.models.card import ModelCard
from gpuworker.operations.names import shape_of
from gpuworker.state import LatentState
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

_RAN_OUT_MAX = 64  # requests
_KINDS_MAX = 64
_TILED_RUNS = 32  # decodes of a kind in tiles, before the whole is tried again

K = TypeVar("K")
V = TypeVar("V")
Kind = tuple[str, int, int, int]  # model, width, height, frames


class Decoded(NamedTuple):
    """What a decode made: uint8 (frames, height, width, 3); whether it took the whole at once."""

    frames: NDArray[np.uint8]
    whole: bool


class Decodes:
    """A worker's decodes: remembers whose ran out of memory, and what does not fit whole."""

    def __init__(self) -> None:
        self._ran_out: dict[str, None] = {}  # requests
        self._tiled: dict[Kind, int] = {}  # decodes of it in tiles, since the whole was tried

    def frames(
        self, card: ModelCard, member: mesh_pb2.BatchMember, state: LatentState
    ) -> NDArray[np.uint8]:
        """The pictures of a job's finished state. Raises as `decoded`."""
        shape, request = shape_of(member), member.request_id
        kind = (card.facts.name, shape.width, shape.height, shape.frames)
        runs = self._tiled.get(kind)
        whole = runs is None or runs >= _TILED_RUNS
        again = request in self._ran_out or member.attempt > 1 or runs is not None
        try:
            made = decoded(card, state, whole=whole, smaller=again)
        except Exception as error:
            if ran_out(error):
                _remember(self._ran_out, request, None, _RAN_OUT_MAX)
            raise
        self._ran_out.pop(request, None)
        if made.whole:
            self._tiled.pop(kind, None)
        else:
            _remember(self._tiled, kind, 0 if whole or runs is None else runs + 1, _KINDS_MAX)
        return made.frames


def decoded(card: ModelCard, state: LatentState, *, smaller: bool, whole: bool = True) -> Decoded:
    """The pictures of a finished state; in `smaller` tiles where the whole is too much, or is not
    to be tried.

    Raises whatever the decoder raises: of memory, only when the smallest tiles took too much.
    """
    tiles = card.smaller_tiles() if smaller else iter(())
    first = (nullcontext(),) if whole else ()
    ways: Iterator[AbstractContextManager[None] | None] = itertools.chain(first, tiles, (None,))
    for number, (way, after) in enumerate(itertools.pairwise(ways)):
        assert way is not None
        try:
            with way:
                return Decoded(card.decode(state), whole and number == 0)
        except Exception as error:
            if not ran_out(error):
                raise
            _free(card, error)
            if after is None:
                raise
            log.warning("%s: no memory for a decode; on in smaller tiles", card.facts.name)
    raise AssertionError("the last way returns or raises")


def _remember(known: dict[K, V], key: K, value: V, most: int) -> None:
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]


def _free(card: ModelCard, error: Exception) -> None:
    """What the failed decode had made lives in its frames, and in the decoder."""
    traceback.clear_frames(error.__traceback__)
    card.forget_decode()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
