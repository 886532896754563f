"""`python -m control`: one replica of the control plane."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from control.config import ControlSettings
from control.scheduler.policies import registry
from control.scheduler.warm import compile_all
from control.service import serve
from hocket import garbage
from hocket.clock import SystemClock
from hocket.config import load_or_exit
from hocket.errors import HocketError
from hocket.tracing import telemetry

log = logging.getLogger(__name__)

_TELL_AFTER_S = 2.0
_POLICIES = f"Planning policy: {', '.join(registry.names())}."


def main(
    cluster: Annotated[str | None, typer.Option(help="Name of the cluster.")] = None,
    nats_url: Annotated[
        str | None, typer.Option(help="URL of the broker; several with commas.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Folder for addresses and traces.")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port; port 0 picks a free one.")] = None,
    policy: Annotated[str | None, typer.Option(help=_POLICIES)] = None,
    policy_set: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the policy, KEY=VALUE; repeatable."),
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="CSV of call times, beside the shipped ones; repeatable."),
    ] = None,
    round_us: Annotated[
        int | None, typer.Option(help="Planning interval in µs; 0 derives it.")
    ] = None,
    lead_us: Annotated[
        int | None, typer.Option(help="How long before a round its plan is sent, in µs.")
    ] = None,
    lease_us: Annotated[int | None, typer.Option(help="Lease of a worker, in µs.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="host:port at which gateways reach this replica; default: as --listen."),
    ] = None,
    retention_s: Annotated[
        int | None, typer.Option(help="Seconds for which ended requests are kept.")
    ] = None,
    tls_dir: Annotated[
        Path | None, typer.Option(help="This role's folder made by `hocket certs`.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a \\[control] table.")] = None,
) -> None:
    """Runs one replica of the control plane: admission, planning, dispatch.

    Every setting can also come from HOCKET_<NAME> (of --set HOCKET_POLICY_SETTINGS, of --profile
    HOCKET_PROFILES) or from the TOML file named by --config.
    """
    options = {
        "cluster": cluster,
        "nats_url": nats_url,
        "state_dir": state_dir,
        "listen": listen,
        "policy": policy,
        "policy_settings": tuple(policy_set) if policy_set else None,
        "profiles": tuple(profile) if profile else None,
        "round_us": round_us,
        "lead_us": lead_us,
        "lease_us": lease_us,
        "address": address,
        "retention_s": retention_s,
        "tls_dir": tls_dir,
        "log_level": log_level,
    }
    settings = load_or_exit(ControlSettings, options, config)
    told = telemetry.setup("control", "0", settings.state_dir, settings.log_level)
    try:
        if settings.policy == "hocket":
            _compile_planner()
        garbage.take_over()
        asyncio.run(_run(settings, told))
    except HocketError as error:
        print(f"control: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    finally:
        told.close()


def _compile_planner() -> None:
    """Compiles what no earlier start has left in the cache; a signal still ends the process."""
    slow = "compiling the planner, once per installation (10 to 30 s)"
    teller = threading.Timer(_TELL_AFTER_S, log.info, (slow,))
    teller.daemon = True
    teller.start()
    try:
        compile_all()
    finally:
        teller.cancel()


async def _run(settings: ControlSettings, told: telemetry.Telemetry) -> None:
    stop = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    await serve(settings, SystemClock(), told, stop)


if __name__ == "__main__":
    typer.run(main)
