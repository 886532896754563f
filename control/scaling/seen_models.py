"""The models that workers serve or have served of late, with the kinds of GPU that they did it on.

A model stays listed when its last worker is gone, until nobody has served it for the retention.
What is known outlives a leader: it is one value in a KV bucket (`control/catalogue_store.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hocket.v1 import control_pb2, generation_pb2, mesh_pb2
from hocket.workflows.roles import together

MODELS_MAX = 1_024  # those not served for longest are forgotten first
KINDS_MAX = 16  # of GPUs, by model
_STALE_US = 60_000_000  # how old the stored time of a model may be


@dataclass(slots=True)
class _Seen:
    info: generation_pb2.ModelInfo
    gpus: dict[str, None]  # the one seen last comes last
    at_us: int  # when a worker served it last, since 1970
    able: dict[str, None]  # operations that workers of it have offered: of roles that left, too


@dataclass(slots=True)
class ModelsSeen:
    """One leader's memory of models."""

    kept_us: int
    changes: int = 0  # counts what is worth storing
    _seen: dict[str, _Seen] = field(default_factory=dict)  # the one served last comes last
    _workers: Counter[str] = field(default_factory=Counter)  # living, by model

    def see(self, beats: Iterable[mesh_pb2.Heartbeat], unix_us: int) -> None:
        """Takes the newest heartbeats of all living workers."""
        beats = sorted(beats, key=lambda beat: beat.worker)
        living = together(model for beat in beats for model in beat.models)
        self._workers = Counter()
        for beat in beats:
            for model in beat.models:
                self._workers[model.name] += 1
                self._note(living[model.name], beat.device.profile_name, unix_us)
        self._forget(unix_us)

    def listed(self) -> tuple[generation_pb2.ModelInfo, ...]:
        """All models, each with its number of living workers: the living first, by name."""
        found = []
        for name in sorted(self._seen, key=lambda n: (not self._workers[n], n)):
            info = generation_pb2.ModelInfo()
            info.CopyFrom(self._seen[name].info)
            info.workers = self._workers[name]
            found.append(info)
        return tuple(found)

    def asleep(self) -> dict[str, generation_pb2.ModelInfo]:
        """Models without a living worker, by name, as all their workers served them."""
        found = {}
        for name, seen in self._seen.items():
            if not self._workers[name]:
                info = found[name] = generation_pb2.ModelInfo()
                info.CopyFrom(seen.info)
                info.operations[:] = seen.able
        return found

    def kinds(self) -> Mapping[str, tuple[str, ...]]:
        """Kinds of GPU by model, the one seen last first."""
        return {name: tuple(reversed(seen.gpus)) for name, seen in self._seen.items()}

    def stored(self) -> control_pb2.SeenModels:
        """As it is kept for the next leader."""
        return control_pb2.SeenModels(
            models=[
                control_pb2.SeenModel(info=seen.info, gpus=seen.gpus, served_unix_us=seen.at_us)
                for seen in self._seen.values()
            ]
        )

    def restore(self, kept: control_pb2.SeenModels, unix_us: int) -> None:
        """Takes over what an earlier leader knew; what this one has seen itself is newer."""
        ours, self._seen = self._seen, {}
        for model in sorted(kept.models, key=lambda m: m.served_unix_us):
            gpus = dict.fromkeys(model.gpus)
            able = dict.fromkeys(model.info.operations)
            self._seen[model.info.name] = _Seen(model.info, gpus, model.served_unix_us, able)
        for name, seen in ours.items():
            self._seen.pop(name, None)
            self._seen[name] = seen
        self._forget(unix_us)

    def _note(self, model: generation_pb2.ModelInfo, gpu: str, unix_us: int) -> None:
        seen = self._seen.get(model.name)
        if seen is None:
            self.changes += 1
            able = dict.fromkeys(model.operations)
            self._seen[model.name] = _Seen(model, {gpu: None}, unix_us, able)
            return
        if seen.info != model or gpu not in seen.gpus or unix_us - seen.at_us > _STALE_US:
            self.changes += 1
            seen.at_us = unix_us
        seen.info = model
        seen.able |= dict.fromkeys(model.operations)
        seen.gpus.pop(gpu, None)
        seen.gpus[gpu] = None
        while len(seen.gpus) > KINDS_MAX:
            del seen.gpus[next(iter(seen.gpus))]

    def _forget(self, unix_us: int) -> None:
        by_age = sorted(self._seen, key=lambda n: (bool(self._workers[n]), self._seen[n].at_us))
        excess = len(self._seen) - MODELS_MAX
        for number, name in enumerate(by_age):
            is_old = self._seen[name].at_us + self.kept_us <= unix_us
            if number < excess or (is_old and not self._workers[name]):
                del self._seen[name]
                self.changes += 1
