"""Workloads that follow a plan in time: request scales, phases, the published elasticity test."""

from __future__ import annotations

import msgspec

from .arrivals import during, pick, renewals, stream
from .case import CaseError
from .trace import TraceRequest
from .workload_base import Parameters, alone_us, request

# LegoDiffusion's artifact: rate of its production trace at request scale 1, its irregularity, how
# its three tenants share it, and the mean times of the unmodified pipelines that make the SLOs.
DIFLOW_RATE, DIFLOW_CV, DIFLOW_SHARES = 0.74, 1.09, (0.45, 0.31, 0.24)
SCHNELL_ALONE_S = {
    "flux.1-schnell": 1.9871,
    "flux.1-schnell+canny": 2.0688,
    "flux.1-schnell+depth": 2.4,
}
SCHNELL_STEPS = 4
FAMILY_STEPS = {"sdxl": 30, "sd3-medium": 28, "flux.1-dev": 28}
FAMILIES_PROFILE = "diflow_families_h800.csv"
WAN, WAN_PX, WAN_FRAMES = "wan2.2-i2v-a14b-4step", (832, 480), 81


class DiFlowWorkload(Parameters, frozen=True):
    """Three workflows (or model families) at a request scale, with a burst if wanted."""

    request_scale: float = 1.0
    duration_s: float = 120.0
    slo_scale: float = 2.0  # times the time alone
    cv: float = DIFLOW_CV
    burst_factor: float = 1.0  # of the rate, inside the window
    burst_from_s: float = 40.0
    burst_until_s: float = 60.0

    def make(self, seed: int) -> list[TraceRequest]:
        if not 0 <= self.burst_from_s <= self.burst_until_s <= self.duration_s:
            allowed = f"0..burst_until_s <= duration_s ({self.duration_s:g})"
            raise CaseError("workload.burst_from_s", self.burst_from_s, allowed)
        rng = stream(self.name, seed, "arrivals")
        rate = DIFLOW_RATE * self.request_scale
        spans = [(0.0, self.duration_s, rate)]
        if self.burst_factor != 1.0:
            spans = [
                (0.0, self.burst_from_s, rate),
                (self.burst_from_s, self.burst_until_s, rate * self.burst_factor),
                (self.burst_until_s, self.duration_s, rate),
            ]
        arrivals = [t for begin, end, r in spans for t in during(rng, begin, end, r, self.cv)]
        tenants = stream(self.name, seed, "tenants")
        alone_s, steps_of = self._models()
        made = []
        for i, at_s in enumerate(arrivals):
            model = pick(tenants, tuple(alone_s), DIFLOW_SHARES)
            workflow = "txt2img" if "+" not in model else f"txt2img+{model.split('+')[1]}"
            slo_s = self.slo_scale * alone_s[model]
            made.append(request(i, at_s, model, workflow, 1024, 1, steps_of[model], slo_s))
        return made

    def _models(self) -> tuple[dict[str, float], dict[str, int]]:
        """Time alone in seconds, and steps, by model."""
        if self.name == "diflow-schnell":
            return SCHNELL_ALONE_S, dict.fromkeys(SCHNELL_ALONE_S, SCHNELL_STEPS)
        alone = alone_us(FAMILIES_PROFILE, FAMILY_STEPS)
        return {m: alone[m, 1024] / 1e6 for m in FAMILY_STEPS}, FAMILY_STEPS


class DisagElasticity(Parameters, frozen=True):
    """Three phases on a fixed beat: 4-step videos, half and half, 1-step videos."""

    phase_s: float = 300.0
    interval_s: tuple[float, float, float] = (10.0, 7.0, 5.0)  # the second is not published
    slo_s: float = 136.5  # 1.5 x the 91 s of one 4-step video under light load
    slo_1_step_s: float = 0.0  # 0: as the others

    def make(self, seed: int) -> list[TraceRequest]:
        kinds = stream(self.name, seed, "kinds")
        made: list[TraceRequest] = []
        for phase, interval_s in enumerate(self.interval_s):
            if interval_s <= 0:
                raise CaseError("workload.interval_s", self.interval_s, "positive seconds")
            beats = int(self.phase_s / interval_s)
            short = [phase == 2 or (phase == 1 and i % 2 == 1) for i in range(beats)]
            if phase == 1:
                kinds.shuffle(short)
            for i, is_short in enumerate(short):
                at_s = phase * self.phase_s + i * interval_s
                steps = 1 if is_short else 4
                slo_s = (self.slo_1_step_s if is_short else 0.0) or self.slo_s
                made.append(
                    request(len(made), at_s, WAN, "img2vid", WAN_PX, WAN_FRAMES, steps, slo_s)
                )
        return made


class DisagSlo(Parameters, frozen=True):
    """Poisson arrivals of 4-step videos at a rate; the published plan measures goodput."""

    per_second: float = 0.045
    count: int = 65
    slo_s: float = 136.5
    steps: int = 4

    def make(self, seed: int) -> list[TraceRequest]:
        if not 1e-6 <= self.per_second <= 1e6:
            raise CaseError("workload.per_second", self.per_second, "1e-6..1e6")
        rng = stream(self.name, seed, "arrivals")
        return [
            request(i, at_s, WAN, "img2vid", WAN_PX, WAN_FRAMES, self.steps, self.slo_s)
            for i, at_s in enumerate(renewals(rng, self.count, self.per_second * 60))
        ]


class RequestKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of request in a phase's mix."""

    model: str
    width: int
    height: int
    steps: int
    slo_s: float
    workflow: str = "txt2img"
    frames: int = 1
    share: float = 1.0  # relative
    priority: int = 0


class Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A span of time with one rate and one mix."""

    duration_s: float
    rate: float  # requests a minute
    mix: tuple[RequestKind, ...]
    cv: float = 1.0  # of the gaps: 0 is a fixed beat, 1 is Poisson


class Phases(Parameters, frozen=True):
    """Spans one after the other."""

    phases: tuple[Phase, ...]

    def make(self, seed: int) -> list[TraceRequest]:
        begin_s = 0.0
        made: list[TraceRequest] = []
        for number, phase in enumerate(self.phases):
            if phase.duration_s <= 0 or phase.rate <= 0 or not phase.mix:
                allowed = "a positive duration_s and rate, and a mix"
                raise CaseError(f"workload.phases[{number}]", phase, allowed)
            arrivals = stream(self.name, seed, f"arrivals-{number}")
            kinds = stream(self.name, seed, f"kinds-{number}")
            shares = [k.share for k in phase.mix]
            end_s = begin_s + phase.duration_s
            for at_s in during(arrivals, begin_s, end_s, phase.rate / 60, phase.cv):
                k = pick(kinds, phase.mix, shares)
                made.append(
                    request(
                        len(made),
                        at_s,
                        k.model,
                        k.workflow,
                        (k.width, k.height),
                        k.frames,
                        k.steps,
                        k.slo_s,
                        k.priority,
                    )
                )
            begin_s = end_s
        return made


PLANS: dict[str, type[Parameters]] = {
    "diflow-schnell": DiFlowWorkload,
    "diflow-families": DiFlowWorkload,
    "disagfusion-elasticity": DisagElasticity,
    "disagfusion-slo": DisagSlo,
    "phases": Phases,
}
