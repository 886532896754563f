"""The client's part for workflows: uploads, and what can be registered, listed and shown."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from hocket.errors import InvalidRequest, Violation
from hocket.gateways import Gateways
from hocket.v1.generation_pb2 import InputHeader, PutInputRequest, PutInputResponse
from hocket.v1.workflows_pb2 import (
    DeleteWorkflowRequest,
    GetWorkflowRequest,
    ListWorkflowsRequest,
    RegisterWorkflowRequest,
    WorkflowSpec,
)

_PIECE_BYTES = 256 << 10
_FILE_BYTES_MAX = 64 << 20  # gateways take no more


class WorkflowCalls:
    """Calls of `HocketClient`."""

    _gateways: Gateways

    async def put_input(
        self, file: str | Path | bytes, *, mask: bool = False, tenant: str = ""
    ) -> PutInputResponse:
        """Uploads a picture, by its path or its content; `name` of what comes back is what
        `inputs` of a request take. `mask`: one channel, white where something is made anew.

        Raises InvalidRequest where it is no picture that can be taken.
        """
        content = file if isinstance(file, bytes) else await asyncio.to_thread(_read, Path(file))
        return await self._gateways.ask(
            lambda: self._gateways.generation.PutInput(_pieces(content, tenant, mask=mask))
        )

    async def workflows(self) -> Sequence[WorkflowSpec]:
        """The newest version of each workflow, shipped ones included, by name."""
        asked = ListWorkflowsRequest()
        answer = await self._gateways.ask(lambda: self._gateways.workflows.ListWorkflows(asked))
        return tuple(answer.workflows)

    async def workflow(self, name: str) -> WorkflowSpec:
        """One, by "name" or "name@digest"; raises Refused (UNKNOWN_WORKFLOW)."""
        asked = GetWorkflowRequest(name=name)
        answer = await self._gateways.ask(lambda: self._gateways.workflows.GetWorkflow(asked))
        return answer.workflow

    async def register_workflow(
        self, workflow: WorkflowSpec, *, only_check: bool = False
    ) -> WorkflowSpec:
        """Registers it under its name; what comes back has its digest. Where gateways ask for keys
        it takes an operator's. Raises InvalidRequest with every fault."""
        asked = RegisterWorkflowRequest(workflow=workflow, validate_only=only_check)
        answer = await self._gateways.ask(lambda: self._gateways.workflows.RegisterWorkflow(asked))
        return answer.workflow

    async def delete_workflow(self, name: str) -> None:
        """Forgets a registered workflow with all its versions; requests that were accepted go
        on."""
        asked = DeleteWorkflowRequest(name=name)
        await self._gateways.ask(lambda: self._gateways.workflows.DeleteWorkflow(asked))


def _read(path: Path) -> bytes:
    """Raises InvalidRequest where the file cannot be read or is too large."""
    try:
        size = path.stat().st_size
        if size > _FILE_BYTES_MAX:
            raise _wrong(path, f"{size} bytes", f"at most {_FILE_BYTES_MAX}")
        return path.read_bytes()
    except OSError as error:
        raise _wrong(path, error.strerror or "no file", "a file that can be read") from None


async def _pieces(content: bytes, tenant: str, *, mask: bool) -> AsyncIterator[PutInputRequest]:
    """The header, and then the content."""
    digest = hashlib.sha256(content).hexdigest()
    yield PutInputRequest(
        header=InputHeader(sha256=digest, size_bytes=len(content), tenant=tenant, mask=mask)
    )
    for start in range(0, len(content), _PIECE_BYTES):
        yield PutInputRequest(data=content[start : start + _PIECE_BYTES])


def _wrong(path: Path, found: str, allowed: str) -> InvalidRequest:
    return InvalidRequest((Violation(str(path), f"found {found}; allowed: {allowed}"),))
