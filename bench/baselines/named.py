"""The baselines as the registry of policies takes them."""

from __future__ import annotations

from control.scheduler.policies.base import Registered

from .diffusers import Diffusers
from .diffusers_c import DiffusersC
from .diffusers_s import DiffusersS
from .monolith import Monolith
from .rasp import Rasp
from .rssp import Rssp
from .sjf import Sjf
from .srtf import Srtf

DIFFUSERS = Registered(Diffusers.SPECS, Diffusers.made)
DIFFUSERS_C = Registered(DiffusersC.SPECS, DiffusersC.made)
DIFFUSERS_S = Registered(DiffusersS.SPECS, DiffusersS.made)
MONOLITH = Registered(Monolith.SPECS, Monolith.made)
RASP = Registered(Rasp.SPECS, Rasp.made)
RSSP = Registered(Rssp.SPECS, Rssp.made)
SJF = Registered(Sjf.SPECS, Sjf.made)
SRTF = Registered(Srtf.SPECS, Srtf.made)
