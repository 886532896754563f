"""Measures what a parked job takes, spilling one and getting it back, weights that come and go.

`python -m gpuworker.measuring.parked ROUNDS` prints one JSON object of sizes (KiB) and times (ms);
`python -m bench memory` lays it out. Files are in the page cache.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.loading import load_card
from gpuworker.memory.weights import MemoryDemand, WeightStore
from gpuworker.state import LatentState
from hocket.clock import steady_ns

_CPU = torch.device("cpu")
_SIDES_PX = (64, 128, 256)
_LARGE = 8192  # of a square of float32: 256 MiB
_KIB, _MIB = 1 << 10, 1 << 20

Found = dict[str, list[float]]


def measure(rounds: int) -> dict[str, Found]:
    """By unit and name."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sizes: Found = {}
    times: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        _parked(sizes, times, rounds, Path(folder) / "state")
    model = "hocket-emoji"
    whole = WeightStore(_CPU)
    load_card(str(EMBEDDED_MODEL), _CPU, torch.float32, whole)
    parts = {fact.nodes[0]: fact.size_bytes for fact in whole.facts()}
    store = WeightStore(_CPU, max(parts.values()))
    load_card(str(EMBEDDED_MODEL), _CPU, torch.float32, store)
    store.start(lambda _: 0)
    for part, size in parts.items():
        _come_and_go(times, store, part, rounds, f"{model} {part[1]}, {size / _MIB:.1f} MiB")
    store.close()
    with tempfile.TemporaryDirectory() as folder:
        module = nn.Linear(_LARGE, _LARGE, bias=False)
        save_file(dict(module.state_dict()), Path(folder) / "weights.safetensors")
        store = WeightStore(_CPU, module.weight.nbytes)
        store.add(("large", "dit"), "large", module, tuple(Path(folder).iterdir()))
        store.start(lambda _: 0)
        _come_and_go(times, store, ("large", "dit"), rounds, f"{_LARGE * _LARGE * 4 // _MIB} MiB")
        store.close()
    return {"KiB": sizes, "ms": times}


def _parked(sizes: Found, times: Found, rounds: int, file: Path) -> None:
    card = load_card(str(EMBEDDED_MODEL), _CPU, torch.float32)
    for side in _SIDES_PX:
        first = card.encode("a fox", "", side, side, 1, 4, 2.0, 1)
        (state,) = card.step([first], None)
        name = f"hocket-emoji {side} px"
        sizes[f"parked job, {name}"] = [state.nbytes / _KIB]
        sizes[f"parked job, {name}, as a file"] = [len(state.to_bytes()) / _KIB]
        for _ in range(rounds):
            out = _ms(partial(_write, state, file))
            back = _ms(partial(_read, file))
            times.setdefault(f"spill to a file, {name}", []).append(out)
            times.setdefault(f"back from a file, {name}", []).append(back)


def _come_and_go(
    times: Found, store: WeightStore, node: tuple[str, str], rounds: int, name: str
) -> None:
    """Each use loads, since everything was made to leave before."""
    for turn in range(rounds):
        store.evict_others(keep=("", ""))
        with store.use(MemoryDemand((1, turn + 1), node, 0)):
            pass
        (fact,) = (fact for fact in store.facts() if node in fact.nodes)
        times.setdefault(f"load weights, {name}", []).append(fact.load_us / 1000)
        left = _ms(lambda: store.evict_others(keep=("", "")))
        times.setdefault(f"evict weights, {name}", []).append(left)


def _write(state: LatentState, file: Path) -> None:
    file.write_bytes(state.to_bytes())


def _read(file: Path) -> LatentState:
    return LatentState.from_bytes(file.read_bytes())


def _ms(work: Callable[[], object]) -> float:
    began_ns = steady_ns()
    work()
    return (steady_ns() - began_ns) / 1e6


def main() -> None:
    """Prints what was found."""
    print(json.dumps(measure(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
