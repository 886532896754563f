"""One leader's parts that make and keep promises, wired together.

    door (servicer, attachments) ▶ admission ▶ driver ▶ publisher ▶ workers
                 ▲                                        │
                 └────────── events ◀── endings ◀─────────┘

Whoever leads builds one, and runs its parts: the service, drivers on a manual clock, simulations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpc_health.v1 import health
from opentelemetry.trace import Tracer

from control.admission import AdmissionControl
from control.driver import Driver, Outlet
from control.entrance.servicer import ControlServicer
from control.planning import Inline, Planning
from control.publisher import Diary, Publisher
from control.requests.attach import Attachments
from control.requests.endings import Endings, PromiseLog
from control.requests.followers import Followers
from control.requests.offers import AdmissionSettings
from control.requests.records import Records
from control.scaling.settings import ScalingSettings
from control.scaling.signal import ScalingSignal, WakeSettings
from control.scheduler.core import Scheduler
from control.scheduler.values import CancelRequested
from control.workers.cluster_view import ClusterView
from control.workers.intake import Intake
from control.workers.leases import Leases
from control.workflow_registry import WorkflowRegistry
from hocket.clock import Clock, unix_ns
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import control_pb2, mesh_pb2


@dataclass(frozen=True)
class Wiring:
    """What a desk stands on."""

    bus: Bus
    subjects: Subjects
    diary: Diary
    promises: PromiseLog
    scheduler: Scheduler
    leases: Leases
    clock: Clock
    tracer: Tracer
    policy: str
    planning: Planning = field(default_factory=Inline)
    follower_grace_us: int = 10_000_000
    ended_max: int = 10_000
    retention_us: int = 86_400_000_000  # ended requests are known so long
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    wake: WakeSettings = field(default_factory=WakeSettings)
    unix_us: Callable[[], int] = lambda: unix_ns() // 1_000
    replicas: Callable[[], Sequence[control_pb2.ReplicaStatus]] = tuple
    stream_replicas: int = 1  # copies of what is stored, in a cluster of brokers
    outlet: Callable[[Publisher], Outlet] = lambda publisher: publisher  # what watches the driver


class _Events:
    """Where endings and progress go before there are lines to tell them on."""

    def __init__(self) -> None:
        self.attachments: Attachments | None = None

    def tell(self, event: mesh_pb2.RequestEvent) -> None:
        if self.attachments is not None:
            self.attachments.tell(event)


@dataclass(frozen=True)
class Desk:
    """The parts; `parts` are what has to run."""

    wiring: Wiring
    records: Records
    driver: Driver
    publisher: Publisher
    endings: Endings
    admission: AdmissionControl
    attachments: Attachments
    view: ClusterView
    signal: ScalingSignal
    servicer: ControlServicer
    troubles: Counter[str]

    @classmethod
    def build(cls, w: Wiring) -> Desk:
        records, events = Records(w.promises.term, w.ended_max, w.retention_us), _Events()
        endings = Endings(w.promises, records, events.tell)
        publisher = Publisher(
            w.bus, w.subjects, w.diary, records, w.leases, endings, events.tell, w.tracer
        )
        driver = Driver(w.scheduler, w.clock, w.outlet(publisher), w.planning)
        troubles: Counter[str] = Counter()
        settle_us, times = w.admission.settle_us, (w.scaling, w.wake, w.unix_us)
        signal = ScalingSignal(driver, records, w.leases, w.clock, *times, settle_us)
        view = ClusterView(
            driver,
            records,
            w.leases,
            w.clock,
            signal,
            term=w.promises.term,
            policy=w.policy,
            replicas=w.replicas,
            troubles=lambda: _told(troubles, w.bus, driver),
        )
        admission = AdmissionControl(
            driver,
            w.promises,
            records,
            view.admitted,
            lambda: bool(w.leases.alive),
            w.clock,
            w.tracer,
            w.admission,
            signal.newcomers,
        )

        def cancel(request: str) -> None:
            driver.post(CancelRequested(at_us=driver.stamp(), request=request))

        attachments = Attachments(
            admission,
            records,
            Followers(w.follower_grace_us),
            cancel,
            w.clock,
            w.promises.term,
            troubles,
        )
        events.attachments = attachments
        workflows = WorkflowRegistry(w.bus, w.subjects, w.stream_replicas)
        servicer = ControlServicer(
            driver, w.promises, records, w.leases, admission, attachments, endings, view, workflows
        )
        return cls(
            w,
            records,
            driver,
            publisher,
            endings,
            admission,
            attachments,
            view,
            signal,
            servicer,
            troubles,
        )

    def intake(
        self,
        superseded: Callable[[int], None],
        healthy: health.aio.HealthServicer | None = None,
    ) -> Intake:
        """The ear for what workers say; `superseded` hears of later terms."""
        return Intake(
            self.wiring.promises.term,
            self.wiring.bus,
            self.wiring.subjects,
            self.wiring.leases,
            self.driver,
            self.publisher,
            self.view,
            self.records,
            superseded,
            self.admission.wake,
            healthy or health.aio.HealthServicer(),
            troubles=self.troubles,
        )

    def parts(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """What runs as long as this leads; each raises what is wrong, and ends only so."""
        return (
            self.driver.run(),
            self.endings.run(),
            self.admission.run(),
            self.attachments.run(),
        )


def _told(troubles: Counter[str], bus: Bus, driver: Driver) -> Mapping[str, int]:
    """Counts of what went wrong, without what never did."""
    counts = {
        **troubles,
        "dropped messages": bus.drops,
        "undecodable messages": bus.undecodable,
        "refused messages": bus.refused,
        "dropped facts": driver.drops.total(),
    }
    return {name: count for name, count in counts.items() if count}
