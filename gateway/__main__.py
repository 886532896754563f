"""`python -m gateway`: one gateway process."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import typer

from gateway.service import serve
from gateway.settings import GatewaySettings
from hocket import telemetry
from hocket.config import load_or_exit
from hocket.errors import HocketError


def main(
    cluster: str | None = None,
    nats_url: str | None = None,
    state_dir: Path | None = None,
    listen: str | None = None,
    control: str | None = None,
    grace_s: float | None = None,
    log_level: str | None = None,
    config: Path | None = None,
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
        "log_level": log_level,
    }
    settings = load_or_exit(GatewaySettings, options, config)
    telling = telemetry.setup("gateway", "0", settings.state_dir, settings.log_level)
    try:
        asyncio.run(serve(settings, telling))
    except HocketError as error:
        logging.getLogger("gateway").critical("%s", error)
        sys.exit(1)
    finally:
        telling.close()


if __name__ == "__main__":
    typer.run(main)
