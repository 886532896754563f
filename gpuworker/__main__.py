"""`python -m gpuworker`: one or more workers, one process each (emulated ones share a process).

`python -m gpuworker profile MODEL` measures a first profile instead.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpuworker.config import WorkerSettings
from gpuworker.measuring.profile_command import profile as profile_command
from hocket import config as hocket_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command("profile")(profile_command)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    cluster: Annotated[str | None, typer.Option(help="Name of the cluster.")] = None,
    nats_url: Annotated[str | None, typer.Option(help="Where nats-server listens.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Run state: traces.")] = None,
    count: Annotated[int | None, typer.Option(help="Workers to start, one process each.")] = None,
    first_index: Annotated[int | None, typer.Option(help="Number of the first one.")] = None,
    name_prefix: Annotated[
        str | None, typer.Option(help="Names are PREFIX0, PREFIX1 …; else the host's, a dash, 0 …")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="torch or emulated.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    gpu: Annotated[str | None, typer.Option(help="What profiles call the device.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Folder or hub id; repeatable.")] = None,
    batch_max: Annotated[int | None, typer.Option(help="Jobs of one shape at a time.")] = None,
    profile: Annotated[Path | None, typer.Option(help="CSV for the emulated executor.")] = None,
    compile: Annotated[str | None, typer.Option(help="off or default: torch.compile.")] = None,
    attention: Annotated[str | None, typer.Option(help="auto, native or xfuser.")] = None,
    memory_mib: Annotated[
        int | None, typer.Option(help="Device memory to use; 0: all models have to fit.")
    ] = None,
    latents_mib: Annotated[
        int | None, typer.Option(help="Of it, for parked latents; 0: a quarter.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host name told to the planner.")] = None,
    advertise: Annotated[str | None, typer.Option(help="Address for other workers.")] = None,
    tls_dir: Annotated[
        Path | None, typer.Option(help="This role's folder of `hocket certs`.")
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="Seconds for handing latents over, when told to stop.")
    ] = None,
    restarts_max: Annotated[
        int | None, typer.Option(help="Of one worker in ten minutes; more of them end all.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with [gpuworker].")] = None,
) -> None:
    """Runs GPU workers (CPU workers where there is no GPU), or, with a command, that."""
    if context.invoked_subcommand is not None:
        return
    given = {k: v for k, v in locals().items() if k not in ("context", "config", "model")}
    given["model"] = tuple(model) if model else None
    settings = hocket_config.load_or_exit(WorkerSettings, given, config)
    # Late, since an emulated worker must not pay for torch, and forked ones share what is imported
    # here.
    kind = "torch_worker" if settings.executor == "torch" else "emulated_worker"
    module = importlib.import_module(f"gpuworker.{kind}")
    sys.exit(module.run(settings))


if __name__ == "__main__":
    app()
