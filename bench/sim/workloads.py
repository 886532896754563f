"""Workloads by name: `generate("tetriserve-uniform", 3, {"rate": 12})` gives a trace.

    tetriserve-{uniform,skewed}                          TetriServe section 6.1
    genserve-{light,balanced,heavy}-{uniform,skewed}     GENSERVE section 6.1
    mixed-burst                                          ours: FLUX.1-dev with bursts, two classes
    mixed-image-video                                    ours: videos, with bursts of images
    emoji-mixed                                          ours: the shipped models, for live runs
    diflow-schnell, diflow-families                      LegoDiffusion's artifact, request scale
    disagfusion-elasticity, disagfusion-slo              DisagFusion's published plans
    phases                                               spans of any rate, regularity and mix

A workload is a frozen value of its parameters. Rates are requests a minute unless named otherwise;
same name, seed and parameters give the same trace, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import msgspec

from .arrivals import Bursts, pick, renewals, stream
from .case import CaseError
from .trace import TraceRequest
from .workload_base import Parameters, Workload, alone_us, request
from .workload_plans import PLANS

FLUX_PX = (256, 512, 1024, 2048)
FLUX_SLO_S = {256: 1.5, 512: 2.0, 1024: 3.0, 2048: 5.0}
FLUX_STEPS = {"h28": 28, "h50": 50}
CACHED_STEPS = (5, 10, 15, 20, 25)  # of 50; of 28 they leave at least 3
VIDEO, IMAGE = "wan2.2-5b", "sd3.5-medium"
VIDEO_PX, IMAGE_PX = (256, 480, 768), (768, 1024, 1440)
GENSERVE_STEPS = {VIDEO: 50, IMAGE: 28}
EMOJI, MOTION, MOTION_FRAMES = "hocket-emoji", "hocket-emoji-motion", 16
EMOJI_PX, EMOJI_SHARES, EMOJI_SLO_MIN_S = (64, 128, 256), (0.4, 0.4, 0.2), 0.5
VIDEO_SHARE = {"light": 0.2, "balanced": 0.5, "heavy": 0.8}
# Expected sorted Dirichlet(1, 1, 1). The paper names the law only; this fits its mean run times.
SKEWED_THIRDS = (1 / 9, 5 / 18, 11 / 18)


class TetriServeWorkload(Parameters, frozen=True):
    """FLUX.1-dev at four sizes; equal counts, or p proportional to exp(tokens / most tokens)."""

    count: int = 300
    rate: float = 12.0
    slo_scale: float = 1.0  # times 1.5 / 2 / 3 / 5 s
    cv: float = 1.0
    calibration: Literal["h28", "h50"] = "h28"
    cached: bool = False  # requests skip steps (table 3); how many is drawn evenly: ours

    def make(self, seed: int) -> list[TraceRequest]:
        sizes = stream(self.name, seed, "sizes")
        if self.name.endswith("uniform"):
            px_of = [FLUX_PX[i % 4] for i in range(self.count)]
            sizes.shuffle(px_of)
        else:
            most = (FLUX_PX[-1] / 16) ** 2
            weights = [math.exp((px / 16) ** 2 / most) for px in FLUX_PX]
            px_of = [pick(sizes, FLUX_PX, weights) for _ in range(self.count)]
        arrivals = renewals(stream(self.name, seed, "arrivals"), self.count, self.rate, self.cv)
        cache = stream(self.name, seed, "cache")
        made = []
        for i, (at_s, px) in enumerate(zip(arrivals, px_of, strict=True)):
            steps = FLUX_STEPS[self.calibration]
            if self.cached:
                steps -= cache.choice(CACHED_STEPS)
            slo_s = FLUX_SLO_S[px] * self.slo_scale
            made.append(request(i, at_s, "flux.1-dev", "txt2img", px, 1, steps, slo_s))
        return made


class GenServeWorkload(Parameters, frozen=True):
    """Videos and images, three sizes each; SLO = sigma x 1.5 x the time alone on one GPU."""

    count: int = 300
    rate: float = 24.0
    slo_scale: float = 1.0  # the paper's sigma
    cv: float = 1.0
    reference: str = "genserve_rtx-pro-6000_x1.5.csv"  # profile of the times alone

    def make(self, seed: int) -> list[TraceRequest]:
        _, mix, skew = self.name.split("-")
        alone = alone_us(self.reference, GENSERVE_STEPS)
        kinds, sizes = stream(self.name, seed, "kinds"), stream(self.name, seed, "sizes")
        videos = round(self.count * VIDEO_SHARE[mix])
        is_video = [True] * videos + [False] * (self.count - videos)
        kinds.shuffle(is_video)
        weights = SKEWED_THIRDS if skew == "skewed" else (1 / 3,) * 3
        arrivals = renewals(stream(self.name, seed, "arrivals"), self.count, self.rate, self.cv)
        made = []
        for i, (at_s, video) in enumerate(zip(arrivals, is_video, strict=True)):
            px = pick(sizes, VIDEO_PX if video else IMAGE_PX, weights)
            made.append(genserve_request(i, at_s, video, px, self.slo_scale, alone))
        return made


def genserve_request(
    number: int,
    at_s: float,
    video: bool,
    px: int,
    sigma: float,
    alone: Mapping[tuple[str, int], int],
    priority: int = 0,
) -> TraceRequest:
    """A video or an image of GENSERVE's models, with its deadline by their rule."""
    model, workflow, frames = (VIDEO, "txt2vid", 81) if video else (IMAGE, "txt2img", 1)
    slo_s = sigma * 1.5 * alone[model, px] / 1e6
    steps = GENSERVE_STEPS[model]
    return request(number, at_s, model, workflow, px, frames, steps, slo_s, priority)


class MixedBurst(Parameters, frozen=True):
    """FLUX.1-dev; 8-fold rate in 20 s of every 120 s, then smaller sizes; a fifth is relaxed."""

    count: int = 300
    rate: float = 8.0  # outside bursts
    slo_scale: float = 1.2  # of interactive requests; relaxed ones get six times that
    calibration: Literal["h28", "h50"] = "h28"
    burst_factor: float = 8.0

    def make(self, seed: int) -> list[TraceRequest]:
        sizes, classes = stream(self.name, seed, "sizes"), stream(self.name, seed, "classes")
        bursts = Bursts(factor=self.burst_factor)
        arrivals = bursts.arrivals(stream(self.name, seed, "arrivals"), self.count, self.rate)
        steps = FLUX_STEPS[self.calibration]
        made = []
        for i, at_s in enumerate(arrivals):
            hot = bursts.hot(at_s)
            px = pick(sizes, FLUX_PX, (0.4, 0.3, 0.2, 0.1) if hot else (1, 1, 1, 1))
            interactive = classes.random() < 0.8
            slo_s = FLUX_SLO_S[px] * self.slo_scale * (1.0 if interactive else 6.0)
            made.append(
                request(
                    i, at_s, "flux.1-dev", "txt2img", px, 1, steps, slo_s, 1 if interactive else 0
                )
            )
        return made


class MixedImageVideo(Parameters, frozen=True):
    """GENSERVE's models: a steady mix with half videos, and bursts of images only."""

    count: int = 300
    rate: float = 12.0  # outside bursts
    slo_scale: float = 1.0
    burst_factor: float = 8.0
    video_share: float = 0.5  # outside bursts; inside, a tenth of it

    def make(self, seed: int) -> list[TraceRequest]:
        alone = alone_us("genserve_rtx-pro-6000_x1.5.csv", GENSERVE_STEPS)
        kinds, sizes = stream(self.name, seed, "kinds"), stream(self.name, seed, "sizes")
        bursts = Bursts(factor=self.burst_factor)
        arrivals = bursts.arrivals(stream(self.name, seed, "arrivals"), self.count, self.rate)
        made = []
        for i, at_s in enumerate(arrivals):
            share = self.video_share * (0.1 if bursts.hot(at_s) else 1.0)
            video = kinds.random() < share
            px = pick(sizes, VIDEO_PX if video else IMAGE_PX, (1, 1, 1))
            made.append(genserve_request(i, at_s, video, px, self.slo_scale, alone))
        return made


class EmojiMixed(Parameters, frozen=True):
    """The models that Hocket ships: pictures at three sizes, and short videos.

    SLO = slo_scale x the time alone on one worker by the given profile, and never below a floor
    (what a call through the mesh takes is not in the profile).
    """

    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Parameters.RANGES,
        "video_share": (0.0, 1.0),
    }
    count: int = 60
    rate: float = 40.0
    slo_scale: float = 3.0
    cv: float = 1.0
    video_share: float = 0.15
    picture_steps: int = 20
    video_steps: int = 12
    video_px: int = 64
    reference: str = "emoji_cpu.csv"  # profile of the times alone

    def make(self, seed: int) -> list[TraceRequest]:
        steps = {EMOJI: self.picture_steps, MOTION: self.video_steps}
        alone = alone_us(self.reference, steps)
        kinds, sizes = stream(self.name, seed, "kinds"), stream(self.name, seed, "sizes")
        arrivals = renewals(stream(self.name, seed, "arrivals"), self.count, self.rate, self.cv)
        made = []
        for i, at_s in enumerate(arrivals):
            video = kinds.random() < self.video_share
            model, workflow = (MOTION, "txt2vid") if video else (EMOJI, "txt2img")
            px = self.video_px if video else pick(sizes, EMOJI_PX, EMOJI_SHARES)
            frames = MOTION_FRAMES if video else 1
            slo_s = max(EMOJI_SLO_MIN_S, self.slo_scale * alone[model, px] / 1e6)
            made.append(request(i, at_s, model, workflow, px, frames, steps[model], slo_s))
        return made


def generate(name: str, seed: int, parameters: Mapping[str, Any]) -> tuple[TraceRequest, ...]:
    """The trace of a workload. Raises: CaseError for a name or parameter that is not allowed."""
    return tuple(workload(name, parameters).make(seed))


def workload(name: str, parameters: Mapping[str, Any]) -> Workload:
    """The checked value of a workload's parameters. Raises: CaseError."""
    kinds: dict[str, type[Parameters]] = {**FAMILIES, **PLANS}
    kind = kinds.get(name)
    if kind is None:
        raise CaseError("workload.name", name, f"one of {', '.join(sorted(kinds))}")
    known = [f for f in kind.__struct_fields__ if f != "name"]
    for key, value in parameters.items():
        if key not in known:
            raise CaseError(f"workload.{key}", value, f"for {name}: one of {', '.join(known)}")
    try:
        made = msgspec.convert({"name": name, **parameters}, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, CaseError):
            raise error.__cause__ from None
        raise CaseError(f"workload of {name}", dict(parameters), str(error)) from None
    return cast(Workload, made)


FAMILIES: dict[str, type[Parameters]] = {
    "tetriserve-uniform": TetriServeWorkload,
    "tetriserve-skewed": TetriServeWorkload,
    **{f"genserve-{m}-{s}": GenServeWorkload for m in VIDEO_SHARE for s in ("uniform", "skewed")},
    "mixed-burst": MixedBurst,
    "mixed-image-video": MixedImageVideo,
    "emoji-mixed": EmojiMixed,
}
