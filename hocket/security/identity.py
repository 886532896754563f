"""A process's own certificate, as it lies in a folder of `hocket certs`, and the doors it opens.

gRPC between services is mutual: each side shows a certificate of the cluster's CA, and control
looks at the caller's role. Callers of a gateway check the gateway's; it asks for theirs only where
`client_certs` is set. The broker maps certificates to permissions (see broker_rules.py).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc

from hocket.errors import WrongConfig
from hocket.messaging.bus import BrokerAccess
from hocket.security.broker_rules import api_of, inbox_of
from hocket.security.certificates import common_name

log = logging.getLogger(__name__)

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Identity:
    """What one process shows to others, and the CA by which it checks them."""

    folder: Path
    ca: bytes
    cert: bytes
    key: bytes

    @classmethod
    def load(cls, folder: Path | None) -> Identity | None:
        """Reads a role's folder; None where none is named. Raises WrongConfig."""
        if folder is None:
            return None
        try:
            ca, cert, key = (
                (folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")
            )
        except OSError as error:
            allowed = f"a folder that `hocket certs` made ({error.filename}: {error.strerror})"
            raise WrongConfig("tls_dir", str(folder), allowed) from None
        return cls(folder, ca, cert, key)

    def ssl_context(self, *, server: bool = False) -> ssl.SSLContext:
        """Mutual TLS for sockets of our own and for the broker."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.ca.decode())
        context.load_cert_chain(self.folder / "cert.pem", self.folder / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def open_channel(
    address: str,
    options: Options,
    identity: Identity | None,
    role: str,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """A channel to a service of ours; with an identity only to one that shows `role`'s name."""
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
    named = [*options, ("grpc.ssl_target_name_override", common_name(role))]
    return grpc.aio.secure_channel(address, credentials, options=named, interceptors=interceptors)


def add_port(
    server: grpc.aio.Server, listen: str, identity: Identity | None, *, mutual: bool
) -> int:
    """Binds a server; with `mutual` only certificates of the cluster's CA are let in.

    Raises WrongConfig where the address is not free.
    """
    try:
        if identity is None:
            return server.add_insecure_port(listen)
        credentials = grpc.ssl_server_credentials(
            [(identity.key, identity.cert)],
            root_certificates=identity.ca if mutual else None,
            require_client_auth=mutual,
        )
        return server.add_secure_port(listen, credentials)
    except RuntimeError:
        raise WrongConfig("--listen", listen, 'a free "host:port"') from None


def role_of(context: Any) -> str | None:
    """Role that a caller's certificate shows; None without one."""
    names = context.auth_context().get("x509_common_name", ())
    for name in names:
        text = name.decode() if isinstance(name, bytes) else str(name)
        if text.startswith(common_name("")):
            return text.removeprefix(common_name(""))
    return None


def tell_if_open(listen: str, identity: Identity | None, what: str) -> None:
    """Logs a warning where a service listens beyond this machine and everybody is let in."""
    if identity is None and not is_loopback(listen):
        log.warning(
            "%s listens on %s without TLS: whoever reaches it may use it. `hocket certs` makes "
            "certificates (docs/operate/security.md)",
            what,
            listen,
        )


def broker_access(identity: Identity | None, role: str) -> BrokerAccess:
    """What a process of that role shows to the broker; nothing without an identity."""
    if identity is None:
        return BrokerAccess()
    return BrokerAccess(
        {
            "tls": identity.ssl_context(),
            "tls_hostname": common_name("broker"),
            "inbox_prefix": inbox_of(role).encode(),
        },
        api_of(role),
    )


def is_loopback(address: str) -> bool:
    """Whether "host:port" (or a host) can be reached from this machine only."""
    host = address.rsplit(":", 1)[0] if address.count(":") in (1,) or "]" in address else address
    host = host.strip("[]")
    if host in ("localhost", ""):
        return host == "localhost"
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
