"""`hocket certs` and `hocket keys`: what a mesh beyond one machine's loopback needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.table import Table

from hocket.cli.common import complaints, console
from hocket.errors import WrongConfig
from hocket.security import api_keys, broker_rules
from hocket.security.certificates import ROLES, make_all

T = TypeVar("T")

keys = typer.Typer(help="Makes, lists and revokes API keys of callers.", no_args_is_help=True)
KeyFile = Annotated[Path, typer.Option("--file", help="Key file, for the gateways' --api-keys.")]
_KEYS = Path("api-keys.json")


def certs(
    folder: Annotated[Path, typer.Argument(help="Folder to make or to complete.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address under which callers reach a gateway; repeatable."),
    ] = None,
    cluster: Annotated[str, typer.Option(help="Name of the cluster.")] = "local",
    broker_listen: Annotated[
        str, typer.Option(help="host:port of the broker's listener.")
    ] = "0.0.0.0:4222",
    broker_store: Annotated[
        str, typer.Option(help="Folder in which the broker stores streams.")
    ] = "/var/lib/hocket/nats",
    installed_at: Annotated[
        Path | None,
        typer.Option(help="Where the broker's folder will lie on its host; default: here."),
    ] = None,
    worker_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST=COUNT",
            help="Workers HOST-0 … HOST-(COUNT-1) get a certificate of their own; repeatable.",
        ),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="Days for which the certificates are valid.")
    ] = 825,
) -> None:
    """Makes a CA, a folder of certificates for each role, and the broker's configuration.

    Copy each folder to the hosts of that role and set HOCKET_TLS_DIR to it there. Existing folders
    are kept: delete a role's folder to renew its certificates.
    """
    try:
        workers = _workers(worker_host or [])
        make_all(folder, host or [], days, tuple(workers))
        at = installed_at or (folder / "broker").resolve()
        text = broker_rules.configuration(cluster, at, broker_listen, broker_store, workers)
        (folder / "broker" / "nats-server.conf").write_text(text)
    except (WrongConfig, OSError) as error:
        complaints.print(str(error), markup=False)
        raise typer.Exit(2) from None
    console.print(f"{folder / 'ca'}: keep ca.key where no service runs", soft_wrap=True)
    for role in ROLES:
        if role == "worker" and workers:
            continue
        console.print(f"{folder / role}: {_USES[role]}", soft_wrap=True, markup=False)
    for name in workers:
        where = folder / f"worker-{name}"
        console.print(f"{where}: {_USES['worker']}", soft_wrap=True, markup=False)


def _workers(said: list[str]) -> dict[str, int]:
    """How many workers each host has. Raises WrongConfig."""
    found: dict[str, int] = {}
    for item in said:
        match = re.fullmatch(r"([a-z0-9][a-z0-9-]{0,39})=([0-9]{1,3})", item)
        if match is None or not int(match[2]):
            allowed = "HOST=COUNT, with the host as in its workers' names: gpu-1=8"
            raise WrongConfig("--worker-host", item, allowed)
        found[match[1]] = int(match[2])
    return found


_USES = {
    "broker": "nats-server -c nats-server.conf",
    "control": "HOCKET_TLS_DIR=… python -m control",
    "gateway": "HOCKET_TLS_DIR=… python -m gateway",
    "worker": "HOCKET_TLS_DIR=… python -m gpuworker",
    "operator": "HOCKET_TLS_DIR=… hocket status, drain, cancel; bench replay",
    "client": "ca.pem for every caller; cert.pem and key.pem where gateways ask for --client-certs",
}


@keys.command("add")
def add(
    tenant: Annotated[str, typer.Argument(help="Account that the key stands for.")],
    operator: Annotated[
        bool, typer.Option("--operator", help="The key may register workflows, too.")
    ] = False,
    file: KeyFile = _KEYS,
) -> None:
    """Makes a key and prints it once; the file keeps only its digest."""
    name, secret = _told(lambda: api_keys.add(file, tenant, operator=operator))
    complaints.print(f"key {name} of {tenant}; it is not shown again:", markup=False)
    console.print(secret, markup=False, soft_wrap=True)


@keys.command("list")
def list_(file: KeyFile = _KEYS) -> None:
    """Lists the ids of keys, their tenants, and which are operators'."""
    table = Table("id", "tenant", "rights")
    for key in _told(lambda: api_keys.read(file)).keys:
        table.add_row(key.id, key.tenant, "operator" if key.operator else "")
    console.print(table)


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="ID", help="As `hocket keys list` shows it.")],
    file: KeyFile = _KEYS,
) -> None:
    """Revokes a key; gateways refuse it within seconds."""
    found = _told(lambda: api_keys.revoke(file, name))
    console.print(f"revoked {found.id} of {found.tenant}", markup=False)


def _told(work: Callable[[], T]) -> T:
    try:
        return work()
    except WrongConfig as error:
        complaints.print(str(error), markup=False)
        raise typer.Exit(2) from None
