"""The policies by name. To add one: a module with a class like `Fixed`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from ..settings import SettingError, Settings, read_policy_settings
from .base import EventPolicy, Planner, Policy, Registered
from .diffusers import Diffusers
from .diffusers_c import DiffusersC
from .diffusers_s import DiffusersS
from .diflow import DiFlow
from .disagfusion import DisagFusion
from .edf import EdfBestFit, EdfGreedy
from .fixed import Fixed
from .genserve import GenServe
from .hocket.planner import Hocket
from .monolith import Monolith
from .rasp import Rasp
from .rssp import Rssp
from .sjf import Sjf
from .srtf import Srtf
from .tetriserve import TetriServe

REGISTRY: Mapping[str, Registered] = {
    **{f"fixed-{k}": Registered(Fixed.SPECS, Fixed.of_degree(k)) for k in (1, 2, 4, 8)},
    "diffusers": Registered(Diffusers.SPECS, Diffusers.made),
    "diffusers-c": Registered(DiffusersC.SPECS, DiffusersC.made),
    "diffusers-s": Registered(DiffusersS.SPECS, DiffusersS.made),
    "diflow": Registered(DiFlow.SPECS, DiFlow.made),
    "disagfusion": Registered(DisagFusion.SPECS, DisagFusion.made),
    "edf-greedy": Registered(EdfGreedy.SPECS, EdfGreedy.made),
    "edf": Registered(EdfBestFit.SPECS, EdfBestFit.made),
    "monolith": Registered(Monolith.SPECS, Monolith.made),
    "rasp": Registered(Rasp.SPECS, Rasp.made),
    "rssp": Registered(Rssp.SPECS, Rssp.made),
    "sjf": Registered(Sjf.SPECS, Sjf.made),
    "srtf": Registered(Srtf.SPECS, Srtf.made),
    "genserve": Registered(GenServe.SPECS, GenServe.made),
    "hocket": Registered(Hocket.SPECS, Hocket),
    "tetriserve": Registered(TetriServe.SPECS, TetriServe.made),
}


def make_policy(settings: Settings) -> Policy | EventPolicy | Planner:
    """The policy that the settings name. Raises: SettingError."""
    made = REGISTRY.get(settings.policy)
    if made is None:
        raise SettingError("policy", settings.policy, " | ".join(REGISTRY))
    read = read_policy_settings(settings.policy, made.specs, settings.policy_settings)
    return made.make(settings, read)
