"""What every call of this gateway shares."""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.trace import Tracer

from gateway.background import Background
from gateway.cluster import Cluster
from gateway.departures import Departures
from gateway.media import MediaStore
from gateway.settings import GatewaySettings
from hocket.bus import Bus, Subjects


@dataclass(frozen=True)
class Mesh:
    """The planes that a call uses. Made once by the server."""

    bus: Bus
    subjects: Subjects
    cluster: Cluster
    media: MediaStore
    background: Background
    departures: Departures
    tracer: Tracer
    settings: GatewaySettings
