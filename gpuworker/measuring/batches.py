"""Measures what stepping jobs together saves: the embedded model, batches of 1, 2, 4 and 8.

`python -m gpuworker.measuring.batches` prints one JSON object: by side in pixels and batch, the
ratio to batch 1, its median and its tenth and ninetieth percentile. Each round steps every batch
once, in random order, and a ratio is taken inside a round; times are the thread's own CPU time. So
other work on the machine hardly shows. `control/assets/profiles` holds the rows: the ratio times
the measured row of batch 1.
"""

from __future__ import annotations

import json
import random
from statistics import median, quantiles

import torch

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.loading import load_card
from gpuworker.state import LatentState
from hocket.clock import thread_cpu_ns

_BATCHES = (1, 2, 4, 8)
_ROUNDS = {64: 60, 128: 40, 256: 14}  # by side
_WARM_UP = 2
_SEED = 7
_GUIDANCE = 1.5  # two branches, as in `python -m gpuworker profile`


def main() -> None:
    """Runs all rounds on one thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    card = load_card(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)
    order, found = random.Random(_SEED), {}

    def state(side: int, seed: int) -> LatentState:
        return card.encode("a fox", "", side, side, 1, 8, _GUIDANCE, seed)

    for side, rounds in _ROUNDS.items():
        states = [state(side, seed) for seed in range(max(_BATCHES))]
        took: dict[int, list[int]] = {batch: [] for batch in _BATCHES}
        for turn in range(rounds + _WARM_UP):
            for batch in order.sample(_BATCHES, len(_BATCHES)):
                began_ns = thread_cpu_ns()
                card.step(states[:batch], None)
                took_ns = thread_cpu_ns() - began_ns
                if turn >= _WARM_UP:
                    took[batch].append(took_ns)
        for batch in _BATCHES[1:]:
            ratios = [a / b for a, b in zip(took[batch], took[1], strict=True)]
            deciles = quantiles(ratios, n=10)
            found[f"{side} px, batch {batch}"] = {
                "rounds": rounds,
                "median": round(median(ratios), 3),
                "p10": round(deciles[0], 3),
                "p90": round(deciles[-1], 3),
            }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
