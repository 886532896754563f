"""Measures what a finished picture or video costs the compute thread: encoded by that thread, and
beside it (steps/encoding.py).

`python -m gpuworker.measuring.encoding ROUNDS [SEED]` prints one JSON object by kind of file, in
pairs of both ways in changing order: milliseconds of processor time that the thread spends on it;
and beside the encoding, the part of its work that it gets done: in torch, which gives the
interpreter free, and in plain Python, as where it launches a GPU's steps.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from statistics import median
from time import thread_time_ns

import numpy as np
import torch

from gpuworker.operations.pictures import Pixels
from gpuworker.steps.encoding import EncodingThreads
from gpuworker.steps.media import encode_media
from hocket.clock import steady_ns

_KINDS = {
    "PNG 1024x1024": ((1, 1024, 1024), "image/png"),
    "WebP 1024x1024": ((1, 1024, 1024), "image/webp"),
    "H.264 832x480x33": ((33, 480, 832), "video/mp4"),
}
_FPS = 16
_SIDE = 384  # of the product that stands for a step
_ALONE_NS = 300_000_000  # for which work is counted without an encoding beside it

Figures = dict[str, float]


def measure(rounds: int, seed: int) -> dict[str, Figures]:
    """Medians over the pairs."""
    torch.set_num_threads(1)
    drawn = np.random.default_rng(seed)
    return {
        name: _measured(_frames(drawn, *kind[0]), kind[1], rounds) for name, kind in _KINDS.items()
    }


def _measured(frames: Pixels, media_type: str, rounds: int) -> Figures:
    held: dict[str, list[float]] = {"by the thread": [], "beside it": []}
    kept: dict[str, list[float]] = {"torch": [], "Python": []}
    matrix = torch.ones(_SIDE, _SIDE)
    works: dict[str, Callable[[], object]] = {
        "torch": lambda: matrix @ matrix,
        "Python": lambda: sum(range(2000)),
    }
    for number in range(rounds):
        for way in sorted(held, reverse=number % 2 == 1):
            if way == "by the thread":
                began_ns = thread_time_ns()
                encode_media(frames, media_type, _FPS)
                held[way].append((thread_time_ns() - began_ns) / 1e6)
                continue
            for name, work in works.items():
                held_ms, share = _beside(frames, media_type, work)
                held[way].append(held_ms)
                kept[name].append(share)
    return {
        **{f"spent {way}, ms": median(times) for way, times in held.items()},
        **{f"work kept beside it, {name}": median(shares) for name, shares in kept.items()},
    }


def _beside(frames: Pixels, media_type: str, work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds that the thread spends on it, and how much of its work it does meanwhile, as a
    part of what it does alone.
    """
    done, threads = threading.Event(), EncodingThreads()

    def encode() -> None:
        encode_media(frames, media_type, _FPS)
        done.set()

    end_ns = steady_ns() + _ALONE_NS
    alone = _rate(work, lambda: steady_ns() >= end_ns)
    began_ns = thread_time_ns()
    threads.submit(frames.nbytes, encode)
    held_ms = (thread_time_ns() - began_ns) / 1e6
    beside = _rate(work, done.is_set)
    threads.close(1.0)
    return held_ms, beside / alone


def _rate(work: Callable[[], object], over: Callable[[], bool]) -> float:
    """Pieces of work a nanosecond."""
    began_ns, count = steady_ns(), 0
    while not over():
        work()
        count += 1
    return count / max(1, steady_ns() - began_ns)


def _frames(drawn: np.random.Generator, count: int, height: int, width: int) -> Pixels:
    """A gradient that moves, with noise: neither flat nor random."""
    rows, columns = np.linspace(0, 60, height), np.linspace(0, 255, width)
    moves = np.arange(1, count + 1)[:, None, None, None]
    shades = columns[None, None, :, None] + rows[None, :, None, None] * moves
    noise = drawn.normal(0, 4, (count, height, width, 3))
    return ((shades + noise) % 256).astype(np.uint8)


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    print(json.dumps(measure(given[0] if given else 8, given[1] if given[1:] else 0), indent=1))
