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

Role = Annotated[
    list[str] | None,
    typer.Option(help="text, dit or vae: loads and serves that alone; repeatable. None: all."),
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command("profile")(profile_command)

EXECUTORS = {"torch": "gpuworker.torch_worker", "emulated": "gpuworker.emulation.worker"}


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    cluster: Annotated[str | None, typer.Option(help="Name of the cluster.")] = None,
    nats_url: Annotated[
        str | None, typer.Option(help="URL of the broker; several with commas.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder for traces.")] = None,
    count: Annotated[int | None, typer.Option(help="Workers to start, one process each.")] = None,
    first_index: Annotated[
        int | None, typer.Option(help="Number in the first worker's name.")
    ] = None,
    name_prefix: Annotated[
        str | None, typer.Option(help="Names are PREFIX0, PREFIX1 …; default: HOST-0, HOST-1 …")
    ] = None,
    executor: Annotated[
        str | None, typer.Option(help="torch; or emulated: sleeps by --profile, computes nothing.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Name of the device in profiles.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id, also as NAME=FOLDER; repeatable.")
    ] = None,
    role: Role = None,
    batch_max: Annotated[int | None, typer.Option(help="Most jobs in a batch.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Call times to emulate, CSV.")] = None,
    compile: Annotated[
        str | None, typer.Option(help="off; or default: model blocks go through torch.compile.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Of a split sequence: native, xfuser, or auto.")
    ] = None,
    memory_mib: Annotated[
        int | None, typer.Option(help="MiB of device memory to use; 0: every model stays resident.")
    ] = None,
    latents_mib: Annotated[
        int | None, typer.Option(help="MiB of that for parked latents; 0: a quarter.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host name for the planner.")] = None,
    advertise: Annotated[
        str | None,
        typer.Option(help="Address for other workers; default: the one that faces the broker."),
    ] = None,
    tls_dir: Annotated[
        Path | None, typer.Option(help="This role's folder made by `hocket certs`.")
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="Seconds to hand latents over after SIGTERM.")
    ] = None,
    restarts_max: Annotated[
        int | None,
        typer.Option(help="Restarts of one worker in ten minutes; one more ends the command."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with a \\[gpuworker] table.")
    ] = None,
) -> None:
    """Runs GPU workers, or CPU workers where there is no GPU.

    Every setting can also come from HOCKET_<NAME> or from the TOML file named by --config.
    """
    if context.invoked_subcommand is not None:
        return
    given = {k: v for k, v in locals().items() if k not in ("context", "config")}
    given |= {"model": tuple(model) if model else None, "role": tuple(role) if role else None}
    settings = hocket_config.load_or_exit(WorkerSettings, given, config)
    # Late, since an emulated worker must not pay for torch, and forked ones share what is imported
    # here.
    module = importlib.import_module(EXECUTORS[settings.executor])
    sys.exit(module.run(settings))


if __name__ == "__main__":
    app()
