"""The operations of version 1: what a node may call, what it takes and makes, how it can be set.

A port's type is what passes through it. `part` names the weights of a model that the operation
needs (a node of the plain chain); empty: none. A stepped operation is called once a denoising step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hocket.v1.workflows_pb2 import PortType, WorkflowNode

TEXT, FILE = PortType.PORT_TYPE_TEXT, PortType.PORT_TYPE_FILE
PIXELS, LATENTS = PortType.PORT_TYPE_PIXELS, PortType.PORT_TYPE_LATENTS
EMBEDDINGS = PortType.PORT_TYPE_EMBEDDINGS

STEPS_MAX = 1000
SettingValue = str | int | float


@dataclass(frozen=True)
class OperationPort:
    """Something that an operation takes or makes."""

    name: str
    type: PortType.ValueType
    optional: bool = False
    needs: str = ""  # it makes sense only where this other port is fed, too
    excludes: str = ""  # nor where this one is
    extra: bool = False  # only models that name it among their operations take it
    grey: bool = False  # pixels of one channel: a mask


@dataclass(frozen=True)
class NumberSetting:
    """A number that can be set; bounds are inclusive unless `above` says that the least is not."""

    name: str
    low: float
    high: float
    default: float | None = None  # None: absent, which has a meaning of its own (`absent`)
    whole: bool = False
    above: bool = False  # more than `low`
    absent: str = ""
    needs: str = ""  # it makes sense only where this port is fed

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        noun = "a whole number" if self.whole else "a number"
        low = f"more than {self.low:g} and at most" if self.above else f"of {self.low:g} to"
        return f"{noun} {low} {self.high:.12g}"

    def takes(self, value: SettingValue) -> bool:
        """Whether it may be set to that."""
        if isinstance(value, str | bool):
            return False
        is_above = value > self.low if self.above else value >= self.low
        return is_above and value <= self.high and (not self.whole or float(value).is_integer())


@dataclass(frozen=True)
class ChoiceSetting:
    """One of several words."""

    name: str
    choices: tuple[str, ...]
    default: str
    needs: str = ""

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        return ", ".join(self.choices)

    def takes(self, value: SettingValue) -> bool:
        """Whether it may be set to that."""
        return value in self.choices


SettingRule = NumberSetting | ChoiceSetting
SCALE = NumberSetting("scale", 0.0, 1.0, 1.0, above=True)


@dataclass(frozen=True)
class OperationRule:
    """What one operation takes and makes."""

    name: str
    inputs: tuple[OperationPort, ...]
    outputs: tuple[OperationPort, ...]
    part: str = ""  # "text", "dit" or "vae"; empty: no weights
    stepped: bool = False
    own: tuple[SettingRule, ...] = ()
    changes_size: bool = False  # what it takes may have another size than what it makes
    keeps_grey: bool = False  # of a mask it makes a mask
    settings: Mapping[str, SettingRule] = field(init=False)

    def __post_init__(self) -> None:
        rules = {rule.name: rule for rule in (SCALE, *self.own)}
        object.__setattr__(self, "settings", MappingProxyType(rules))

    def input(self, name: str) -> OperationPort | None:
        """The port of that name that takes something."""
        return next((port for port in self.inputs if port.name == name), None)

    def output(self, name: str) -> OperationPort | None:
        """The port of that name that makes something."""
        return next((port for port in self.outputs if port.name == name), None)


_DENOISE = (
    NumberSetting("steps", 0, STEPS_MAX, 0, whole=True),
    NumberSetting("strength", 0.0, 1.0, 1.0, needs="latents"),
    NumberSetting("guidance_scale", 0.0, 1000.0, absent="the request's"),
    NumberSetting("seed_offset", 0, (1 << 32) - 1, 0, whole=True),
    NumberSetting("control_scale", 0.0, 2.0, 1.0, needs="control"),
)
_RULES = (
    OperationRule(
        "load_image",
        (OperationPort("image", FILE),),
        (OperationPort("image", PIXELS),),
        own=(ChoiceSetting("fit", ("cover", "contain", "stretch"), "cover"),),
        changes_size=True,
    ),
    OperationRule(
        "load_mask",
        (OperationPort("mask", FILE),),
        (OperationPort("mask", PIXELS, grey=True),),
        changes_size=True,
    ),
    OperationRule(
        "encode_prompt",
        (OperationPort("prompt", TEXT), OperationPort("negative_prompt", TEXT, optional=True)),
        (OperationPort("embeddings", EMBEDDINGS),),
        part="text",
    ),
    OperationRule(
        "encode_image",
        (OperationPort("image", PIXELS),),
        (OperationPort("latents", LATENTS),),
        part="vae",
    ),
    OperationRule(
        "denoise",
        (
            OperationPort("embeddings", EMBEDDINGS),
            OperationPort("latents", LATENTS, optional=True),
            OperationPort("mask", PIXELS, optional=True, needs="latents", extra=True, grey=True),
            OperationPort("reference", LATENTS, optional=True, extra=True),
            OperationPort("control", LATENTS, optional=True, excludes="reference", extra=True),
        ),
        (OperationPort("latents", LATENTS),),
        part="dit",
        stepped=True,
        own=_DENOISE,
    ),
    OperationRule(
        "decode", (OperationPort("latents", LATENTS),), (OperationPort("image", PIXELS),), "vae"
    ),
    OperationRule(
        "resize",
        (OperationPort("image", PIXELS),),
        (OperationPort("image", PIXELS),),
        own=(ChoiceSetting("method", ("lanczos", "bicubic", "nearest"), "lanczos"),),
        changes_size=True,
        keeps_grey=True,
    ),
    OperationRule("make_media", (OperationPort("image", PIXELS),), (OperationPort("media", FILE),)),
)
OPERATIONS: Mapping[str, OperationRule] = MappingProxyType({rule.name: rule for rule in _RULES})


def needed_operations(node: WorkflowNode) -> dict[str, str]:
    """What a model has to name among its operations for a node of its own: by port, "" for the call
    itself. Of a node that has no faults; empty where it needs no weights.
    """
    rule = OPERATIONS[node.op]
    if not rule.part:
        return {}
    ports = (port.name for port in rule.inputs if port.extra and port.name in node.inputs)
    return {"": rule.name, **{name: f"{rule.name}.{name}" for name in ports}}


def port_type_name(kind: PortType.ValueType) -> str:
    """A type as people write it: TEXT, FILE, PIXELS, EMBEDDINGS or LATENTS."""
    known = kind in PortType.values()
    return PortType.Name(kind).removeprefix("PORT_TYPE_") if known else f"type {kind}"
