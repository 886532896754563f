"""The demo's second part: a picture in two passes, and which worker ran which node of its workflow.

text ─▶ denoise ─▶ decode ─▶ resize ─▶ encode ─▶ denoise ─▶ decode ─▶ media
        (half the width and height)              (over the enlarged picture)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from rich.live import Live
from rich.text import Text

from hocket.cli.common import console
from hocket.cli.generate import describe, target
from hocket.client import HocketClient, request
from hocket.v1.generation_pb2 import Accepted, Finished, MediaChunk, ModelInfo, Progress
from hocket.workflows.drawing import drawn

WORKFLOW = "two-pass"
_OPERATIONS = ("encode_prompt", "encode_image", "denoise", "decode")  # with weights
_SIDE = 128  # pixels: the first pass makes half of it
_SEED = 11
_DEADLINE_S = 60.0
_CALL_S = 240.0  # listening to the request


@dataclass
class NodeRun:
    """What was seen of one node."""

    workers: list[str] = field(default_factory=list)  # in the order in which they came
    calls: int = 0
    took_us: int = 0

    def saw(self, progress: Progress) -> None:
        """Counts one call."""
        self.workers += [w for w in progress.workers if w not in self.workers]
        self.calls += 1
        self.took_us += progress.step_time_us

    @property
    def note(self) -> str:
        """What is written beside the node."""
        steps = f"{self.calls} steps, " if self.calls > 1 else ""
        return f"{' '.join(self.workers)}: {steps}{self.took_us / 1000:.0f} ms"


def able(known: Sequence[ModelInfo]) -> ModelInfo | None:
    """A model for pictures that runs every operation of the workflow, if there is one."""
    return next(
        (m for m in known if "txt2img" in m.workflows and set(_OPERATIONS) <= set(m.operations)),
        None,
    )


async def show(client: HocketClient, model: ModelInfo, output: Path) -> None:
    """Makes the picture, draws the workflow's graph with who ran what, writes the file.

    Raises HocketError.
    """
    spec = await client.workflow(WORKFLOW)
    prompt = model.examples[0] if model.examples else "a fox"
    wanted = request(
        prompt,
        model=model.name,
        workflow=WORKFLOW,
        shape=(_SIDE, _SIDE),
        seed=_SEED,
        deadline_s=_DEADLINE_S,
    )
    runs: dict[str, NodeRun] = {}
    whole, finished, path = bytearray(), Finished(), output
    with Live(console=console, transient=True, refresh_per_second=8) as live:
        async with aclosing(client.generate(wanted, timeout_s=_CALL_S)) as events:
            accepted = Accepted()
            async for event in events:
                match event:
                    case Accepted():
                        accepted = event
                    case Progress():
                        runs.setdefault(event.node, NodeRun()).saw(event)
                        live.update(Text(f"{WORKFLOW} {prompt!r}: {describe(event)}"))
                    case MediaChunk():
                        whole += event.data
                    case Finished():
                        finished = event
                        path = output / target(None, accepted.request_id, event.media).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(whole))
    console.print(f"\na picture in two passes ({WORKFLOW}), from its file back to the prompt:")
    console.print(drawn(spec, {node: run.note for node, run in runs.items()}))
    kept = "kept" if finished.on_time else "MISSED"
    console.print(
        f"{_SIDE}x{_SIDE} {prompt!r}  took {finished.latency_us / 1e6:.2f} s, "
        f"deadline {_DEADLINE_S:g} s {kept}\n  {path}",
        markup=False,
        soft_wrap=True,
    )
