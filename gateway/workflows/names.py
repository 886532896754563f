"""Which workflow a request names: a model's own, a shipped one, or one that control has registered.

Names are asked of control and kept for a moment; a version that is named with its digest never
changes. Whoever registers through this gateway finds its new version here at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hocket.clock import Clock
from hocket.errors import Refused
from hocket.v1.generation_pb2 import ModelInfo
from hocket.v1.workflows_pb2 import (
    DeleteWorkflowRequest,
    GetWorkflowRequest,
    ListWorkflowsRequest,
    RegisterWorkflowRequest,
    WorkflowSpec,
)
from hocket.workflows.content import is_called, parsed_name
from hocket.workflows.shipped import shipped

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only

_FRESH_US = 2_000_000
_KEPT_MAX = 512


class Asking(Protocol):
    """Puts a question to the leader of the control plane (see `ClusterWatch.ask`)."""

    async def __call__(
        self, question: Callable[[ControlServiceAsyncStub], Awaitable[Any]]
    ) -> Any: ...


@dataclass(frozen=True)
class WantedWorkflow:
    """What a request names beside a model's own workflow."""

    spec: WorkflowSpec | None = None  # None: a model's own, or nothing that is known
    known: tuple[str, ...] = ()  # names, where nothing was found


class WorkflowNames:
    """Finds workflows. One a gateway."""

    def __init__(self, ask: Asking, clock: Clock) -> None:
        self._ask = ask
        self._clock = clock
        self._listed: tuple[str, ...] = ()
        self._listed_until_us = 0
        self._kept: OrderedDict[str, tuple[WorkflowSpec, int]] = OrderedDict()  # until when

    async def wanted(self, name: str, models: Sequence[ModelInfo]) -> WantedWorkflow:
        """What `name` of a request means, where `models` are served. Raises NotReady."""
        if not name or any(name in model.workflows for model in models):
            return WantedWorkflow()
        spec = await self._find(name)
        if spec is not None:
            return WantedWorkflow(spec)
        now_us = self._clock.now_us()
        if now_us >= self._listed_until_us:  # for people: not to be asked at every mistake
            self._listed = tuple(one.name for one in await self.list())
            self._listed_until_us = now_us + _FRESH_US
        return WantedWorkflow(known=self._listed)

    async def get(self, name: str) -> WorkflowSpec:
        """One, as control knows it. Raises Refused (UNKNOWN_WORKFLOW), InvalidRequest, NotReady."""
        asked = GetWorkflowRequest(name=name)
        answer = await self._ask(lambda control: control.GetWorkflow(asked))
        spec: WorkflowSpec = answer.workflow
        return spec

    async def list(self) -> Sequence[WorkflowSpec]:
        """The newest versions of all. Raises NotReady."""
        answer = await self._ask(lambda control: control.ListWorkflows(ListWorkflowsRequest()))
        return tuple(answer.workflows)

    async def register(self, spec: WorkflowSpec, *, only_check: bool) -> WorkflowSpec:
        """With its digest. Raises InvalidRequest, Refused, NotReady."""
        asked = RegisterWorkflowRequest(workflow=spec, validate_only=only_check)
        answer = await self._ask(lambda control: control.RegisterWorkflow(asked))
        self._kept.pop(spec.name, None)
        made: WorkflowSpec = answer.workflow
        return made

    async def delete(self, name: str) -> None:
        """Raises Refused (UNKNOWN_WORKFLOW), InvalidRequest, NotReady."""
        asked = DeleteWorkflowRequest(name=name)
        await self._ask(lambda control: control.DeleteWorkflow(asked))
        for kept in [kept for kept in self._kept if kept.partition("@")[0] == name]:
            del self._kept[kept]

    async def _find(self, name: str) -> WorkflowSpec | None:
        parsed = parsed_name(name)
        if parsed is None:
            return None
        base, digest = parsed
        if (spec := shipped().get(base)) is not None:
            return spec if is_called(spec, base, digest) else None
        kept = self._kept.get(name)
        if kept is not None and self._clock.now_us() < kept[1]:
            self._kept.move_to_end(name)
            return kept[0]
        try:
            found = await self.get(name)
        except Refused as refused:
            if refused.reason == "UNKNOWN_WORKFLOW":
                return None
            raise
        self._kept[name] = found, self._clock.now_us() + _FRESH_US * (30 if digest else 1)
        if len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)
        return found
