"""`python -m gateway`: one gateway process."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from gateway.service import serve
from gateway.settings import GatewaySettings
from hocket import garbage
from hocket.config import load_or_exit
from hocket.errors import HocketError
from hocket.tracing import telemetry


def main(
    cluster: Annotated[str | None, typer.Option(help="Name of the cluster.")] = None,
    nats_url: Annotated[
        str | None, typer.Option(help="URL of the broker; several with commas.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder for addresses and traces.")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port; port 0 picks a free one.")] = None,
    control: Annotated[
        str | None,
        typer.Option(help="host:port of control replicas, with commas; default: ask the broker."),
    ] = None,
    grace_s: Annotated[
        float | None, typer.Option(help="Seconds for calls to end at a stop.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File made by `hocket keys`; callers then need a key.")
    ] = None,
    tls_dir: Annotated[
        Path | None, typer.Option(help="This role's folder made by `hocket certs`.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a \\[gateway] table.")] = None,
) -> None:
    """Serves the public API: validation, streams of progress and media, health, reflection.

    Every setting can also come from HOCKET_<NAME> or from the TOML file named by --config.
    """
    options = {
        "cluster": cluster,
        "nats_url": nats_url,
        "state_dir": state_dir,
        "listen": listen,
        "control": control,
        "grace_s": grace_s,
        "api_keys": api_keys,
        "tls_dir": tls_dir,
        "log_level": log_level,
    }
    settings = load_or_exit(GatewaySettings, options, config)
    telling = telemetry.setup("gateway", "0", settings.state_dir, settings.log_level)
    garbage.take_over()
    try:
        asyncio.run(serve(settings, telling))
    except HocketError as error:
        logging.getLogger("gateway").critical("%s", error)
        sys.exit(1)
    finally:
        telling.close()


if __name__ == "__main__":
    typer.run(main)
