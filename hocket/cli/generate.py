"""`hocket generate` and `hocket models`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from hocket import free_sizes, media_types
from hocket.cli.common import (
    Address,
    CommandSettings,
    StateDir,
    client_of,
    console,
    pixels,
    run,
    seconds,
    settings,
)
from hocket.cli.workflows import named_files, upload
from hocket.client import Event, HocketClient, request
from hocket.errors import HocketError, MeshStopped
from hocket.tracing import telemetry
from hocket.v1.generation_pb2 import (
    Accepted,
    Degraded,
    Finished,
    GenerateRequest,
    MediaChunk,
    ModelInfo,
    Progress,
)
from hocket.v1.types_pb2 import Commitment, MediaInfo, OnMiss, Shape
from hocket.workflows.roles import missing_roles

SIZE_NAMES = ("small", "medium", "large")
_FRAMES_HELP = "Frames of a video, see `hocket models`; 0: the model's default."
_FIRM_HELP = (
    "Firm: a deadline that was predicted as met is not given up for later requests. "
    "Default: firm with --on-miss reject, else soft."
)
_DETACH_HELP = "Prints the request id and returns; see `hocket watch` and `hocket result`."
_WORKFLOW_HELP = "Workflow, see `hocket workflows list`; default: the model's own."
_INPUT_HELP = "A picture that the workflow takes: a file, or the name of an upload; repeatable."
_LORA_HELP = "A LoRA adapter, see `hocket models`; scale -4 to 4, default 1; repeatable."
_FORMAT_HELP = "Default: by the suffix of -o, else png for a picture, mp4 for a video."


class Miss(StrEnum):
    """What happens when the deadline cannot be kept."""

    BEST_EFFORT = "best-effort"
    REJECT = "reject"
    DEGRADE = "degrade"

    def value_in_proto(self) -> OnMiss.ValueType:
        return OnMiss.Value(f"ON_MISS_{self.name}")


class Format(StrEnum):
    """Kind of file that is made."""

    PNG = "png"
    WEBP = "webp"
    MP4 = "mp4"


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, small, medium or large.")] = "",
    frames: Annotated[int, typer.Option(min=0, help=_FRAMES_HELP)] = 0,
    fps: Annotated[int, typer.Option(min=0, help="Frames per second; 0: the model's.")] = 0,
    made: Annotated[Format | None, typer.Option("--format", help=_FORMAT_HELP)] = None,
    steps: Annotated[int, typer.Option(min=0, help="Denoising steps; 0: the model's.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; default: random.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    model: Annotated[str, typer.Option(help="Model; default: the first.")] = "",
    workflow: Annotated[str, typer.Option(help=_WORKFLOW_HELP)] = "",
    given: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=FILE", help=_INPUT_HELP)
    ] = None,
    loras: Annotated[
        list[str] | None, typer.Option("--lora", metavar="NAME[:SCALE]", help=_LORA_HELP)
    ] = None,
    deadline: Annotated[str, typer.Option(help='Time until it is due: "5s", "800ms".')] = "",
    on_miss: Annotated[Miss, typer.Option(help="If it would be late.")] = Miss.BEST_EFFORT,
    firm: Annotated[bool | None, typer.Option("--firm/--soft", help=_FIRM_HELP)] = None,
    steps_min: Annotated[int, typer.Option(min=0, help="Fewest steps, with degrade.")] = 0,
    size_min: Annotated[str, typer.Option(help="Smallest size, with degrade.")] = "",
    priority: Annotated[int, typer.Option(help="-100 to 100; higher wins.")] = 0,
    tenant: Annotated[str, typer.Option(help="Account of the caller.")] = "",
    key: Annotated[str, typer.Option(help="Idempotency key; default: random.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help=_DETACH_HELP)] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write.")] = None,
    address: Address = None,
    state_dir: StateDir = None,
) -> None:
    """Makes a picture or a video, shows its progress, writes the file.

    hocket generate "a fox on a green background" --size large --deadline 20s -o fox.png

    hocket generate "a fox in snow" --workflow img2img --input image=photo.jpg

    hocket generate "a fox" --lora style:0.8 --lora detail

    hocket generate "a fox bouncing" --model hocket-emoji-motion --frames 8 --fps 8 -o hop.mp4
    """
    found = settings(state_dir, address)

    async def work() -> None:
        wanted = request(
            prompt,
            model=model,
            workflow=workflow,
            loras=loras or (),
            frames=frames,
            fps=fps,
            media_type=media_type(made, output),
            steps=steps,
            seed=seed,
            guidance=guidance,
            deadline_s=seconds("--deadline", deadline) if deadline else 0.0,
            on_miss=on_miss.value_in_proto(),
            commitment=commitment(firm),
            steps_min=steps_min,
            shape_min=pixels("--size-min", size_min) if size_min else None,
            priority=priority,
            tenant=tenant,
            idempotency_key=key,
        )
        files = named_files(given or [])
        await _generate(found, wanted, size, None if detach else _Shown(output), files)

    run(work())


def models(address: Address = None, state_dir: StateDir = None) -> None:
    """Lists the models, with the shapes, frames and steps they take."""
    found = settings(state_dir, address)

    async def work() -> Sequence[ModelInfo]:
        async with client_of(found) as client:
            return await client.models()

    # Folded rather than cut: two models' names may begin alike.
    names, shapes, adapters = (
        Column(head, overflow="fold") for head in ("model", "shapes", "loras")
    )
    table = Table(
        names,
        "workers",
        "workflows",
        shapes,
        "frames",
        "steps",
        "guidance",
        "degrees",
        adapters,
        "try",
    )
    for info in run(work()):
        table.add_row(
            info.name,
            workers_of(info),
            " ".join(info.workflows),
            sizes_offered(info),
            frames_offered(info),
            f"{info.steps_min}-{info.steps_max} ({info.steps_default})",
            f"{info.guidance_kind} {info.guidance_default:g}",
            " ".join(str(degree) for degree in info.degrees),
            " ".join(info.adapters),
            "; ".join(info.examples[:2]),
        )
    console.print(table)


def workers_of(info: ModelInfo) -> str:
    """Workers that serve it, as far as is told, and what none of them does."""
    told = str(info.workers) if info.HasField("workers") else ""
    missing = missing_roles(info) if info.workers else ()
    return f"{told} (no {', '.join(missing)})" if missing else told


def named_size(name: str, shapes: Sequence[Shape]) -> tuple[int, int]:
    """The smallest, middle or largest shape of a model."""
    if not shapes:
        raise MeshStopped("the model names no shapes")
    ordered = sorted(shapes, key=lambda shape: shape.width * shape.height)
    places = {"small": 0, "medium": len(ordered) // 2, "large": len(ordered) - 1}
    shape = ordered[places[name]]
    return shape.width, shape.height


def shape_name(shape: Shape) -> str:
    """A picture's size; a video's with its frames and frames per second: "832x480x81@16"."""
    size = f"{shape.width}x{shape.height}"
    if shape.frames <= 1:
        return size
    return f"{size}x{shape.frames}" + (f"@{shape.fps}" if shape.fps else "")


def sizes_offered(info: ModelInfo) -> str:
    """Its shapes; where sizes are free, also their limits."""
    named = " ".join(shape_name(shape) for shape in info.shapes)
    return f"{named} (or {free_sizes.described(info)})" if free_sizes.are_free(info) else named


def frames_offered(info: ModelInfo) -> str:
    """Numbers of frames that a model's videos may have: "1-121, 4k+1 (81)"; empty of pictures."""
    if not info.HasField("frames"):
        return " ".join(str(n) for n in sorted({s.frames for s in info.shapes if s.frames > 1}))
    counts = info.frames
    if counts.minimum == counts.maximum:
        return str(counts.minimum)
    form = f", {counts.multiple}k" if counts.multiple > 1 else ""
    form += f"+{counts.offset}" if form and counts.offset else ""
    return f"{counts.minimum}-{counts.maximum}{form} ({counts.default_count})"


def replaced_words(asked: str, shown: str) -> str:
    """Tells when the model was given another prompt than the one asked for; else empty."""
    if asked.lower().split() == shown.lower().split():
        return ""
    known = set(shown.lower().split())
    missing = [word for word in asked.split() if word.lower() not in known]
    if not missing:  # a word was added: what it does, where nothing was said of it
        return f"showing {shown!r}"
    what = ", ".join(map(repr, missing))
    return f"no {what} in this model's vocabulary; showing {shown!r}"


def describe(progress: Progress) -> str:
    """One line about a step."""
    return (
        f"{progress.node} step {progress.step}/{progress.steps}  x{progress.degree} "
        f"[{' '.join(progress.workers)}]  {progress.step_time_us / 1e3:.1f} ms  "
        f"ETA {progress.eta_us / 1e6:.1f} s"
    )


def commitment(firm: bool | None) -> Commitment.ValueType:
    """What to ask for; None leaves it to the server."""
    if firm is None:
        return Commitment.COMMITMENT_UNSPECIFIED
    return Commitment.COMMITMENT_FIRM if firm else Commitment.COMMITMENT_SOFT


def media_type(made: Format | None, output: Path | None) -> str:
    """What to ask for: as told, else by the file's name; empty leaves it to the server."""
    if made is not None:
        return media_types.of_suffix(f".{made.value}")
    return media_types.of_suffix(output.suffix) if output is not None else ""


def target(output: Path | None, request_id: str, media: MediaInfo) -> Path:
    """Where the result goes: as told, else `out/<request><suffix>`."""
    suffix = media_types.SUFFIXES.get(media.media_type, ".bin")
    return output or Path("out") / f"{request_id}{suffix}"


async def _generate(
    found: CommandSettings,
    wanted: GenerateRequest,
    size: str,
    shown: _Shown | None,
    files: Mapping[str, Path],
) -> None:
    told = telemetry.setup("client", "cli", found.state_dir, "error")
    try:
        async with client_of(found, told.provider) as client:
            if size:
                await _set_size(client, wanted, size)
            if files:
                names = await upload(client, wanted.spec.workflow, files, wanted.tenant)
                wanted.spec.inputs.update(names)
            if shown is None:
                made = await client.create(wanted)
                console.print(made.request_id)
            else:
                await shown.follow(client.generate(wanted), wanted.spec.prompt)
    finally:
        told.close()


async def _set_size(client: HocketClient, wanted: GenerateRequest, size: str) -> None:
    if size.lower() not in SIZE_NAMES:
        width, height = pixels("--size", size)
    else:
        known = await client.models()
        name = wanted.spec.model
        shapes = next((m.shapes for m in known if name in ("", m.name)), ())
        width, height = named_size(size.lower(), tuple(shapes))
    wanted.spec.shape.width, wanted.spec.shape.height = width, height


class _Shown:
    """How a request is shown while it is made, and where its result goes."""

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self._accepted = Accepted()
        self._whole = bytearray()
        self._bar = ProgressBar(total=1, completed=0, width=24)
        self._line = Text("asking …")

    async def follow(self, stream: AsyncGenerator[Event, None], prompt: str) -> None:
        shown = Group(self._line, self._bar)
        with Live(shown, console=console, transient=True, refresh_per_second=10) as live:
            async with aclosing(stream) as events:
                async for event in events:
                    self._take(event, prompt, live)

    def _take(self, event: Event, prompt: str, live: Live) -> None:
        match event:
            case Accepted():
                self._accepted = event
                live.console.print(greeting(event))
            case Progress():
                self._line.plain = describe(event)
                shown = event.resolved_prompt
                if shown and (told := replaced_words(prompt, shown)):
                    live.console.print(told)
                self._bar.update(completed=event.step, total=max(event.steps, 1))
            case Degraded():
                live.console.print(cheaper(event))
            case MediaChunk():
                self._whole += event.data
            case Finished():
                path = target(self._output, self._accepted.request_id, event.media)
                write(path, bytes(self._whole))
                live.console.print(farewell(self._accepted, event, path))


def cheaper(event: Degraded) -> str:
    """What is run instead, in a line."""
    spec = event.effective_spec
    return f"to be on time: {spec.steps} steps at {spec.shape.width}x{spec.shape.height}"


def greeting(accepted: Accepted) -> str:
    """What was promised, in two lines."""
    spec = accepted.effective_spec
    late = "" if accepted.predicted_on_time else ", later than its deadline"
    lines = [
        f"request {accepted.request_id}: {spec.model}, {shape_name(spec.shape)}, "
        f"{spec.steps} steps, seed {spec.seed}",
        f"predicted {accepted.predicted_latency_us / 1e6:.2f} s{late}; "
        f"{accepted.queue_depth} requests ahead",
    ]
    return "\n".join(lines)


def farewell(accepted: Accepted, finished: Finished, path: Path) -> str:
    """How a request went, in two lines."""
    kept = "on time" if finished.on_time else "late"
    facts = [f"took {finished.latency_us / 1e6:.2f} s"]
    facts.append(f"predicted {accepted.predicted_latency_us / 1e6:.2f} s")
    facts.append(kept)
    for count, noun in (
        (finished.degree_changes, "degree changes"),
        (finished.moves, "moves"),
        (finished.steps_lost, "steps repeated"),
    ):
        if count:
            facts.append(f"{count} {noun}")
    return f"{', '.join(facts)}\n{path}   (hocket trace {accepted.request_id})"


def write(path: Path, content: bytes) -> None:
    """Writes a result; raises a typed error where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise _Unwritable(path, error) from error


class _Unwritable(HocketError):
    def __init__(self, path: Path, error: OSError) -> None:
        self._told = f"cannot write {path}: {error.strerror}"

    def __str__(self) -> str:
        return self._told
