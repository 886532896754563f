"""How every process gets its settings: one frozen value, built once, before anything else starts.

A setting comes from the first of these that names it: a command-line option, the environment
variable `HOCKET_<FIELD>`, the TOML file (its table of the service, then its top level), the default
in the struct. Nothing else in Hocket reads the environment or a settings file. A wrong setting is a
`WrongConfig` that names the key, the value found and what is allowed; `load_or_exit` ends the
process with it.

    class ControlSettings(Common, frozen=True, kw_only=True):
        section: ClassVar[str] = "control"
        policy: Literal["fixed", "tetriserve"] = "tetriserve"

    settings = load_or_exit(ControlSettings, {"policy": policy_option}, config_file)
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta
from msgspec import inspect as shape_of

from hocket.errors import WrongConfig

ENV_PREFIX = "HOCKET_"
SECTIONS = ("gateway", "control", "gpuworker", "hocket")

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
LogLevel = Literal["debug", "info", "warning", "error"]


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that every service has."""

    section: ClassVar[str] = ""  # the service's table in the TOML file

    cluster: Name = "local"  # names the cluster in every NATS subject
    nats_url: str = "nats://127.0.0.1:4222"
    state_dir: Path = Path("state")  # endpoints, traces, logs
    log_level: LogLevel = "info"
    tls_dir: Path | None = None  # this role's folder of `hocket certs`; none: nothing is encrypted


T = TypeVar("T", bound=Common)


def load(kind: type[T], options: Mapping[str, object], file: Path | None = None) -> T:
    """Builds the settings of one process.

    `options` holds command-line options by field name; None means not given. `file` defaults to
    HOCKET_CONFIG. Raises WrongConfig with the key as its author wrote it: `--steps`, `HOCKET_STEPS`
    or `FILE: steps`.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    unknown = options.keys() - fields.keys()
    assert not unknown, f"{kind.__name__} has no settings {sorted(unknown)}"
    hints = get_type_hints(kind, include_extras=True)
    from_file = _read(kind, file)
    values: dict[str, Any] = {}
    for name in fields:
        found = _find(name, options, from_file)
        if found is not None:
            key, raw = found
            values[name] = _convert(key, raw, hints[name])
    return kind(**values)


def load_or_exit(kind: type[T], options: Mapping[str, object], file: Path | None = None) -> T:
    """`load` for a main: a wrong setting is told on stderr and ends the process, status 2."""
    try:
        return load(kind, options, file)
    except WrongConfig as error:
        print(f"{kind.section or 'hocket'}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def otlp_endpoint() -> str:
    """OpenTelemetry's own setting: where spans are sent by OTLP; empty sends them nowhere."""
    return (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or ""
    )


def otlp_metrics_endpoint() -> str:
    """Likewise for metrics."""
    return (
        os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or ""
    )


def inherited() -> dict[str, str]:
    """A copy of the environment, for the child processes of `hocket up`."""
    return dict(os.environ)


def _find(
    name: str, options: Mapping[str, object], from_file: Mapping[str, tuple[str, object]]
) -> tuple[str, object] | None:
    if options.get(name) is not None:
        return f"--{name.replace('_', '-')}", options[name]
    variable = ENV_PREFIX + name.upper()
    if os.environ.get(variable):
        return variable, os.environ[variable]
    return from_file.get(name)


def _read(kind: type[Common], file: Path | None) -> dict[str, tuple[str, object]]:
    if file is None:
        named = os.environ.get(f"{ENV_PREFIX}CONFIG")
        if not named:
            return {}
        file = Path(named)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongConfig("--config", str(file), f"a readable file ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise WrongConfig("--config", str(file), f"a TOML file ({error})") from None
    return _flatten(kind, file, document)


def _flatten(
    kind: type[Common], file: Path, document: Mapping[str, object]
) -> dict[str, tuple[str, object]]:
    shared = [field.encode_name for field in msgspec.structs.fields(Common)]
    own = [field.encode_name for field in msgspec.structs.fields(kind)]
    found: dict[str, tuple[str, object]] = {}
    for key, value in document.items():
        if key not in SECTIONS and key not in shared:
            allowed = ", ".join((*shared, *(f"[{section}]" for section in SECTIONS)))
            raise WrongConfig(f"{file}: {key}", str(value), f"the keys {allowed}")
        if key not in SECTIONS:
            found[key] = (f"{file}: {key}", value)
    table = document.get(kind.section, {})
    if not isinstance(table, dict):
        raise WrongConfig(f"{file}: {kind.section}", str(table), "a table")
    for key, value in table.items():
        if key not in own:
            raise WrongConfig(f"{file}: {kind.section}.{key}", str(value), ", ".join(own))
        found[key] = (f"{file}: {kind.section}.{key}", value)
    return found


def _convert(key: str, raw: object, kind: Any) -> object:
    if isinstance(raw, str) and isinstance(_type_info(kind), _SEQUENCES):
        raw = [part.strip() for part in raw.split(",") if part.strip()]
    if isinstance(raw, Path):
        raw = str(raw)
    elif isinstance(raw, list | tuple):
        raw = [str(part) if isinstance(part, Path) else part for part in raw]
    try:
        return msgspec.convert(raw, kind, strict=False, dec_hook=_decode_path)
    except msgspec.ValidationError:
        raise WrongConfig(key, str(raw), _allowed(_type_info(kind))) from None


def _decode_path(kind: type, raw: object) -> object:
    if kind is Path and isinstance(raw, str):
        return Path(raw)
    raise msgspec.ValidationError(f"expected {kind.__name__}")


_SEQUENCES = (shape_of.VarTupleType, shape_of.ListType)


def _type_info(kind: Any) -> shape_of.Type:
    info = shape_of.type_info(kind)
    return info.type if isinstance(info, shape_of.Metadata) else info


def _allowed(info: shape_of.Type) -> str:
    """What a setting of this type may be, in words."""
    match info:
        case shape_of.LiteralType(values=values):
            return ", ".join(str(value) for value in values)
        case shape_of.EnumType(cls=cls):
            return ", ".join(str(member.value) for member in cls)
        case shape_of.BoolType():
            return "true or false"
        case shape_of.IntType() | shape_of.FloatType():
            noun = "an integer" if isinstance(info, shape_of.IntType) else "a number"
            return noun + _bounds(info)
        case shape_of.StrType(pattern=str() as pattern):
            return f"a string matching {pattern}"
        case shape_of.VarTupleType(item_type=item) | shape_of.ListType(item_type=item):
            return f"a list of: {_allowed(item)}"
        case shape_of.UnionType(types=types):
            return " or ".join(_allowed(one) for one in types)
        case shape_of.CustomType(cls=cls):
            return "a path" if cls is Path else f"a {cls.__name__}"
        case _:
            return type(info).__name__.removesuffix("Type").lower()


def _bounds(info: shape_of.IntType | shape_of.FloatType) -> str:
    words = (
        (info.ge, "at least"),
        (info.gt, "more than"),
        (info.le, "at most"),
        (info.lt, "less than"),
    )
    told = [f"{word} {limit}" for limit, word in words if limit is not None]
    return f" of {' and '.join(told)}" if told else ""
