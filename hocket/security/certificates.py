"""A small certificate authority: one key pair a role, all signed by one CA, by the openssl command.

    DIR/ca/       ca.pem, ca.key          stays with whoever runs the cluster
    DIR/<role>/   ca.pem, cert.pem, key.pem and, for the broker, nats-server.conf
    DIR/worker-<host>/   likewise, where each host of workers gets its own

A certificate's common name and first DNS name are `hocket-<role>`: by it control and the broker
tell roles apart, and by it a client knows that it reached the right kind of service, whatever the
host is called. Hosts and addresses are only needed in the gateway's, which outsiders check.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from hocket.errors import WrongConfig

ROLES = ("broker", "control", "gateway", "worker", "operator", "client")
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_LOCAL = ("localhost", "127.0.0.1", "::1")


def common_name(role: str) -> str:
    """What a certificate of that role calls itself."""
    return f"hocket-{role}"


def make_all(
    folder: Path, hosts: Sequence[str], days: int, worker_hosts: Sequence[str] = ()
) -> None:
    """Makes what is not there yet: a CA, and a folder for each role. Keys are for their owner only.

    `hosts`: names and addresses under which callers reach the gateway. An existing CA is kept, so
    that a role's folder that was deleted is made anew under it. `worker_hosts`: hosts of workers,
    each of which gets a folder `worker-<host>`. Raises WrongConfig.
    """
    if shutil.which("openssl") is None:
        raise WrongConfig("hocket certs", str(folder), "a machine with the openssl command")
    for host in hosts:
        _checked(host)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca = folder / "ca"
    if not (ca / "ca.key").exists():
        _make_ca(ca, days)
    for role in ROLES:
        if not (folder / role / "key.pem").exists():
            names = [common_name(role), *(hosts if role == "gateway" else ())]
            _make_role(ca, folder / role, role, names, days)
    for host in worker_hosts:
        own = folder / f"worker-{host}"
        if not (own / "key.pem").exists():  # the broker goes by the first name that it knows
            names = [common_name(own.name), common_name("worker")]
            _make_role(ca, own, "worker", names, days)


def _make_ca(folder: Path, days: int) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    _openssl(
        *("req", "-x509", *_CURVE, "-days", str(days), "-subj", "/O=hocket/CN=hocket-ca"),
        *("-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.pem")),
        *("-addext", "basicConstraints=critical,CA:TRUE"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    (folder / "ca.key").chmod(0o600)


def _make_role(ca: Path, folder: Path, role: str, names: Sequence[str], days: int) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    request, extensions = folder / "request.pem", folder / "extensions"
    _openssl(
        *("req", "-new", *_CURVE, "-subj", f"/O=hocket/CN={common_name(role)}"),
        *("-keyout", str(folder / "key.pem"), "-out", str(request)),
    )
    (folder / "key.pem").chmod(0o600)
    others = ",".join(_checked(name) for name in (*names, *_LOCAL))
    extensions.write_text(
        f"subjectAltName={others}\nextendedKeyUsage=serverAuth,clientAuth\n"
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
    )
    _openssl(
        *(
            "x509",
            "-req",
            "-in",
            str(request),
            "-days",
            str(days),
            "-out",
            str(folder / "cert.pem"),
        ),
        *("-CA", str(ca / "ca.pem"), "-CAkey", str(ca / "ca.key"), "-CAcreateserial"),
        *("-extfile", str(extensions)),
    )
    shutil.copy(ca / "ca.pem", folder / "ca.pem")
    request.unlink()
    extensions.unlink()


def _checked(host: str) -> str:
    """A host as a certificate names it; raises WrongConfig for what is none."""
    try:
        return f"IP:{ip_address(host)}"
    except ValueError:
        pass
    if not host or not all(c.isalnum() or c in "-.*" for c in host):
        raise WrongConfig("--host", host, "a host name or an address")
    return f"DNS:{host}"


def _openssl(*args: str) -> None:
    run = subprocess.run(["openssl", *args], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise WrongConfig("openssl", args[0], f"a call that works ({run.stderr.strip()[-300:]})")
