"""What a worker is called, where others reach it, and the statuses by which its process ends.

Names are the host's with a number behind it: two hosts that start workers by the same command must
not give the same names, since a name is an address on the bus. They stand in NATS subjects, which
are split at dots, so no name has one.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from gpuworker.config import WorkerSettings
from hocket.errors import HocketError

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG, EXIT_REFUSED = 1, 2, 3
FINAL_STATUSES = (0, EXIT_CONFIG, EXIT_REFUSED)  # another start would end the same way
LOOPBACK = "127.0.0.1"
_HOST_LETTERS_MAX = 40
_DIGEST_LETTERS = 8
_NATS_PORT = 4222


@dataclass
class NameRefused(HocketError):
    """This process is refused, since another living one has its name."""

    worker: str
    why: str

    def __str__(self) -> str:
        return f"this process is refused: {self.why}"


def worker_name(settings: WorkerSettings, index: int) -> str:
    """The index-th worker's name: the prefix that was set, or else the host's name."""
    prefix = settings.name_prefix
    return f"{host_word(settings.host)}-{index}" if prefix is None else f"{prefix}{index}"


def host_word(host: str) -> str:
    """A host's name as part of a worker's: small letters, digits and dashes, at most 40.

    A longer one is cut, and told from others that begin alike by a digest of the whole.
    """
    word = re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-") or "host"
    if len(word) <= _HOST_LETTERS_MAX:
        return word
    digest = hashlib.sha256(host.encode()).hexdigest()[:_DIGEST_LETTERS]
    return f"{word[: _HOST_LETTERS_MAX - _DIGEST_LETTERS - 1].rstrip('-')}-{digest}"


def advertised_address(settings: WorkerSettings) -> str:
    """Where other workers reach this one: as set, or else the address that faces the broker."""
    url = settings.nats_url.split(",")[0]
    parts = urlsplit(url if "//" in url else f"nats://{url}")
    host, port = parts.hostname or LOOPBACK, parts.port or _NATS_PORT
    facing = _facing(host, port)
    beyond = not _is_loopback(facing)
    if settings.advertise:
        if beyond and _is_loopback(settings.advertise):
            what = "other hosts' workers cannot reach this one at %s; --advertise=%s would do"
            log.warning(what, settings.advertise, facing)
        return settings.advertise
    if beyond:
        log.info("other workers reach this one at %s; --advertise says otherwise", facing)
        return facing
    return LOOPBACK


def _facing(host: str, port: int) -> str:
    """This host's own address on the way to another; nothing is sent. Loopback where none is."""
    with suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return LOOPBACK


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"
