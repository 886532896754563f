"""Control's settings: read once at start, frozen, wrong ones stop the process."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from control.scaling.settings import ScalingSettings
from control.scheduler.policies.registry import find
from control.scheduler.settings import SettingError, Settings, read_policy_settings
from control.scheduler.times.profile import OPTIONAL, REQUIRED
from hocket.config import Common
from hocket.errors import WrongConfig
from hocket.messaging.media_bucket import KEPT_S

_ASSETS = Path(__file__).parent / "assets" / "profiles"

Micros = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class ControlSettings(Common, frozen=True, kw_only=True):
    """Settings of `python -m control`."""

    section: ClassVar[str] = "control"

    listen: str = "127.0.0.1:0"  # where ControlService is served
    policy: str = "hocket"  # a name of control/scheduler/policies
    policy_settings: tuple[str, ...] = ()  # key=value, as the policy names them
    profiles: tuple[Path, ...] = ()  # CSV files beside the shipped ones; later files win
    rounds: bool = True  # False: every event is a planning point
    amend: bool = True  # idle workers take waiting jobs inside a round
    round_us: Micros = 0  # planning interval; 0 derives it from the step times in flight
    lead_us: Micros = 20_000  # plans leave this long before their boundary
    stages_ahead: Annotated[int, msgspec.Meta(ge=1)] = 8  # encodes and decodes sent to a worker
    lease_us: Annotated[int, msgspec.Meta(ge=100_000)] = 2_000_000
    requests_open_max: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    follower_grace_us: Micros = 10_000_000  # for a caller whose connection broke to come back
    address: str = ""  # host:port that gateways reach this replica by; empty: as `listen` says
    leader_ttl_us: Annotated[int, msgspec.Meta(ge=1_000_000)] = 3_000_000  # then a standby leads
    retention_s: Annotated[int, msgspec.Meta(ge=1)] = 86_400  # ended requests are known so long …
    ended_max: Annotated[int, msgspec.Meta(ge=1)] = 10_000  # … and no more than so many
    promises_bytes_max: Bytes = 0  # reserved on the broker; 0: up to 256 MiB, as it has room
    diary_bytes_max: Bytes = 0  # likewise
    media_bytes_max: Bytes = 0  # of all finished media; 0: 4 GiB, or what the broker has room for
    media_kept_s: Annotated[float, msgspec.Meta(gt=0)] = KEPT_S
    inputs_bytes_max: Bytes = 0  # of all uploads; 0: 1 GiB, or what the broker has room for
    inputs_kept_s: Annotated[float, msgspec.Meta(ge=60)] = KEPT_S  # uploads can be named so long
    stream_replicas: Literal[1, 3, 5] = 1  # copies of all that, in a cluster of brokers
    # The scaling signal: see docs/operate/scaling.md.
    pool_min: Count = 0  # workers wanted of a pool at least …
    pool_max: Count = 1_000  # … and at most
    pool_utilisation: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    pool_start_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0  # until a new worker's first step
    pool_drain_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0  # then a queue is gone so soon
    pool_quiet_s: Annotated[float, msgspec.Meta(ge=0)] = 180.0  # before workers go
    pool_idle_s: Annotated[float, msgspec.Meta(ge=0)] = 900.0  # before the last one goes
    wake_models: bool = False  # requests for a model without a worker are accepted, and wait …
    wake_wait_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0  # … so long, without a deadline
    models_kept_s: Annotated[float, msgspec.Meta(ge=0)] = 604_800.0  # listed without a worker


def scaling_settings(settings: ControlSettings) -> ScalingSettings:
    """Bounds and times of the scaling signal. Raises WrongConfig."""
    if settings.pool_min > settings.pool_max:
        allowed = f"at most pool_max, {settings.pool_max}"
        raise WrongConfig(key="pool_min", value=str(settings.pool_min), allowed=allowed)
    return ScalingSettings(
        workers_min=settings.pool_min,
        workers_max=settings.pool_max,
        utilisation=settings.pool_utilisation,
        start_us=round(settings.pool_start_s * 1e6),
        drain_us=round(settings.pool_drain_s * 1e6),
        quiet_us=round(settings.pool_quiet_s * 1e6),
        idle_us=round(settings.pool_idle_s * 1e6),
        to_zero=settings.wake_models,
    )


def scheduler_settings(settings: ControlSettings, term: int) -> Settings:
    """The scheduler library's part of the settings; epochs of two terms never collide."""
    pairs: dict[str, str | bool | int | float] = {}
    for item in settings.policy_settings:
        key, equals, value = item.partition("=")
        if not equals:
            raise WrongConfig(key="policy_settings", value=item, allowed="KEY=VALUE")
        pairs[key.strip()] = _value(value.strip())
    try:
        return Settings(
            policy=settings.policy,
            policy_settings=pairs,
            rounds=settings.rounds,
            amend=settings.amend,
            round_us=settings.round_us,
            lead_us=settings.lead_us,
            stages_ahead=settings.stages_ahead,
            epoch_base=term << 32,
        )
    except SettingError as error:
        raise WrongConfig(key=error.key, value=str(error.value), allowed=error.allowed) from error


def best_effort_wait_us_max(settings: ControlSettings) -> int:
    """How long the policy lets best effort wait before it goes first; 0: as long as it takes."""
    specs = find(settings.policy).specs
    given = scheduler_settings(settings, 1).policy_settings
    read = read_policy_settings(settings.policy, specs, given)
    return int(read.get("best_effort_wait_us_max", 0))


def _value(text: str) -> str | bool | int | float:
    """Numbers, true and false are what they look like; everything else is a string."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text


def profile_csv(settings: ControlSettings) -> str:
    """The shipped profiles and the user's, as one CSV text with all columns that any of them has.

    Rows are read where the scheduler is built; here only the headers have to make sense.
    """
    rows: list[dict[str, str]] = []
    for path in (*sorted(_ASSETS.glob("*.csv")), *settings.profiles):
        try:
            reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        except OSError as error:
            raise WrongConfig(
                key="profiles", value=str(path), allowed=f"a readable CSV file ({error.strerror})"
            ) from error
        names = list(reader.fieldnames or ())
        unknown = [n for n in names if n not in REQUIRED + OPTIONAL]
        if unknown or not set(REQUIRED).issubset(names):
            allowed = f"the columns {','.join(REQUIRED)}, and of {','.join(OPTIONAL)}"
            raise WrongConfig(key="profiles", value=f"{path}: {','.join(names)}", allowed=allowed)
        for row in reader:
            if None in row or None in row.values():
                allowed = "as many fields as columns"
                value = f"{path}: line {reader.line_num}"
                raise WrongConfig(key="profiles", value=value, allowed=allowed)
            rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, REQUIRED + OPTIONAL, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
