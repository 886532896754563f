"""Small synthetic experiments."""

from __future__ import annotations

import json
import random
from pathlib import Path

CLASSES = ("flux.1-dev 512x512x1", "flux.1-dev 1024x1024x1")
CASE = """
title = "Synthetic & small"

[[paper]]
cell = { workload = "uniform", rate = 12 }
policy = "edf"
value = 0.83
source = "Table 1 <draft>"

[[paper]]
policy = "hocket"
over = "edf"
value = 1.2
source = "abstract"

[[paper]]
policy = "unknown"
value = 0.5
source = "none"
"""


def row(
    cell: dict[str, object], policy: str, seed: int, met: int, label: str = "", **more: object
) -> dict[str, object]:
    """One run of 100 requests in two equal classes; `met` of them on time."""
    rng = random.Random(f"{policy}{seed}{cell}")
    halves = (met // 2, met - met // 2)
    latencies = [sorted(rng.uniform(0.5, 9.0) for _ in range(48)) for _ in CLASSES]
    return {
        "case": "synthetic",
        "title": "from the rows",
        "cell": cell,
        "policy": policy,
        "label": label or policy,
        "settings": {"round_us": 1000},
        "seed": seed,
        "gpus": 8,
        "profile": "p.csv",
        "costs": {"group_change_us": 0, "group_cold_us": 0, "noise": 0.0},
        "summary": {
            "requests": 100,
            "met": met,
            "attainment": met / 100,
            "by_class": {},
            "latency_s": {"p50": 3.0, "p90": 7.5, "p99": 8.9},
            "gpu_seconds_used": 12.0,
            "utilisation": 0.5,
            "rejected": 4,
            "preemptions": 7,
            "degree_changes": 9,
            "plan_ms": {"p50": 0.1, "p99": 0.2},
        },
        "classes": {
            name: {"requests": 50, "met": half, "latency_s": ms}
            for name, half, ms in zip(CLASSES, halves, latencies, strict=True)
        },
        "bound": min(1.0, met / 100 + 0.02),
        "plans": 5,
        "wall_s": 0.1,
        **more,
    }


def write(folder: Path, rows: list[dict[str, object]], case: str = CASE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "case.toml").write_text(case)
    (folder / "command.txt").write_text("python -m bench sim --case x.toml\nsome <machine>\n")
    return folder


def swept(rates: tuple[int, ...] = (6, 12, 18), workloads: tuple[str, ...] = ("uniform",)) -> list:
    """hocket ahead of edf by six requests of a hundred, both falling with the rate."""
    return [
        row({"workload": w, "rate": r}, policy, seed, 104 - r - lag + seed, label)
        for w in workloads
        for r in rates
        for policy, label, lag in (
            ("edf", "", 12),
            ("hocket", "", 6),
            ("hocket", "hocket no aging", 6),
        )
        for seed in range(3)
    ]
