"""Callers over the public API: they name their request by a key and come back when a stream breaks.

A caller begins at one gateway; when its stream breaks it asks the next one, with the same key. A
rider leaves that to the client, which knows all gateways. What they see goes into the history.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from bench.chaos import wishes
from bench.chaos.history import CANCELLED, FAILED, FINISHED, GIVEN_UP, QUIT, History, ObservedCall
from bench.chaos.pictures import compare
from bench.chaos.wishes import PlannedCall, uploaded_picture
from hocket.client import HocketClient
from hocket.errors import CallFailed, HocketError, NotReady, Refused, RequestFailed
from hocket.v1.generation_pb2 import Accepted, Finished, GenerateRequest, MediaChunk, Progress

_AGAIN_S = 0.1
_CALL_S = 20.0  # of one Cancel
_BROKEN = ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL", "DATA_LOSS", "ABORTED")


@dataclass
class Gateway:
    """A door and its name among the processes."""

    name: str
    client: HocketClient  # of this gateway alone, and without patience
    rider: HocketClient  # of all gateways, this one first; it comes back by itself


@dataclass
class ChaosCallers:
    """What all callers share."""

    gateways: Sequence[Gateway]
    history: History
    now_s: Callable[[], float]  # since the load began
    references: Mapping[str, bytes]  # by wish
    exact: bool  # files have to be byte-equal
    limit_s: float  # after which a patient caller gives up

    async def run(self, call: PlannedCall) -> None:
        """One errand, from the first call to its end; never raises for what the mesh does."""
        observed = ObservedCall(call.key, call.behaviour, self.now_s())
        self.history.calls[call.key] = observed
        doors = [*self.gateways]
        turn = int(call.gateway * len(doors))
        doors = doors[turn:] + doors[:turn]
        try:
            async with asyncio.timeout(self.limit_s):
                await self._behave(call, observed, doors)
        except TimeoutError:
            self._end(observed, GIVEN_UP, observed.problem or "no end was told in time")

    async def _behave(
        self, call: PlannedCall, observed: ObservedCall, doors: list[Gateway]
    ) -> None:
        if call.wish.picture:
            await self._upload(observed, doors)
        if observed.ended:
            return
        if call.behaviour in (wishes.PATIENT, wishes.RIDER):
            await self._follow(call, observed, doors)
        elif call.behaviour == wishes.OPERATION:
            await self._operate(call, observed, doors[0].rider)
        elif call.behaviour == wishes.DETACHED:
            await self._follow(call, observed, doors, until_accepted=True)
            await asyncio.sleep(call.patience_s)
            if not observed.ended:
                await self._follow(call, observed, doors[::-1])
        elif call.behaviour == wishes.QUITTER:
            with suppress(TimeoutError):
                async with asyncio.timeout(call.patience_s):
                    await self._follow(call, observed, doors)
            if not observed.ended:
                self._end(observed, QUIT)
        else:
            following = asyncio.ensure_future(self._follow(call, observed, doors))
            try:
                await asyncio.wait([following], timeout=call.patience_s)
                while not (following.done() or observed.ended):
                    await self._cancel(observed, doors)
                    await asyncio.wait([following], timeout=1.0)
                if following.done():
                    await following
            finally:
                following.cancel()

    async def _upload(self, observed: ObservedCall, doors: list[Gateway]) -> None:
        """Brings the picture again, which the store may have: under the same name as ever."""
        while not observed.uploaded:
            try:
                stored = await doors[0].rider.put_input(uploaded_picture(), tenant=wishes.TENANT)
                observed.uploaded = stored.name
            except HocketError as error:
                if not self._goes_on(observed, error):
                    return
                await asyncio.sleep(_AGAIN_S)

    async def _follow(
        self,
        call: PlannedCall,
        observed: ObservedCall,
        doors: list[Gateway],
        *,
        until_accepted: bool = False,
    ) -> None:
        """Follows a request to its end (or acceptance), through one gateway after the other."""
        wanted = call.wish.asked(
            call.key,
            detached=call.behaviour == wishes.DETACHED,
            deadline_s=call.deadline_s,
            uploaded=observed.uploaded,
        )
        turn = 0
        while not observed.ended:
            door = doors[turn % len(doors)]
            observed.gateway = door.name
            turn += 1
            try:
                if await self._listen(door, wanted, call, observed, until_accepted):
                    return
                observed.problem = "a stream ended without an end"
            except HocketError as error:
                if not self._goes_on(observed, error):
                    return
            observed.breaks += 1
            await asyncio.sleep(_AGAIN_S)

    async def _listen(
        self,
        door: Gateway,
        wanted: GenerateRequest,
        call: PlannedCall,
        observed: ObservedCall,
        until_accepted: bool,
    ) -> bool:
        """Reads one stream; whether it came to what was waited for."""
        media = bytearray()
        finishes = 0
        client = door.rider if call.behaviour == wishes.RIDER else door.client
        events = client.generate(wanted)
        try:
            async for event in events:
                match event:
                    case Accepted(request_id=request_id):
                        self._accepted(observed, request_id)
                        if until_accepted:
                            return True
                    case Progress(workers=workers):
                        observed.workers = tuple(workers)
                        self.history.progress_s[observed.key].append(self.now_s())
                    case MediaChunk(data=data):
                        media += data
                    case Finished():
                        finishes += 1
        finally:
            await events.aclose()
        if not finishes:
            return False
        observed.finishes = max(observed.finishes, finishes)
        await self._finished(call, observed, bytes(media))
        return True

    async def _operate(
        self, call: PlannedCall, observed: ObservedCall, client: HocketClient
    ) -> None:
        """Starts an operation, looks away, and comes back for its end and its file."""
        wanted = call.wish.asked(call.key, deadline_s=call.deadline_s, uploaded=observed.uploaded)
        while not observed.ended:
            try:
                made = await client.create(wanted)
                self._accepted(observed, made.request_id)
                await asyncio.sleep(call.patience_s)
                made = await client.wait(made.request_id)
                if made.error is not None:
                    raise made.error
                if made.done:
                    media = await client.result(made.request_id)
                    await self._finished(call, observed, media)
            except HocketError as error:
                if not self._goes_on(observed, error):
                    return
                observed.breaks += 1
                await asyncio.sleep(_AGAIN_S)

    async def _finished(self, call: PlannedCall, observed: ObservedCall, media: bytes) -> None:
        reference = self.references.get(call.wish.name)
        if reference is not None:
            compared = asyncio.to_thread(compare, media, reference, exact=self.exact)
            observed.picture = await compared
        self._end(observed, FINISHED)

    def _accepted(self, observed: ObservedCall, request_id: str) -> None:
        if observed.accepted_s is None:
            observed.accepted_s = self.now_s()
        if request_id not in observed.ids:
            observed.ids.append(request_id)

    def _goes_on(self, observed: ObservedCall, error: HocketError) -> bool:
        """Whether asking again can help; otherwise the observed has ended."""
        observed.problem = f"{error.reason}: {error}"
        if isinstance(error, NotReady):
            return True
        if isinstance(error, CallFailed) and error.code in _BROKEN:
            return True
        if isinstance(error, Refused) and observed.accepted_s is None:
            observed.refusals.append(error.reason)
            return True
        cancelled = isinstance(error, RequestFailed) and error.why == "CANCELLED"
        self._end(observed, CANCELLED if cancelled else FAILED, observed.problem)
        return False

    async def _cancel(self, observed: ObservedCall, doors: list[Gateway]) -> None:
        """One try: an acknowledged cancel is the end, else the stream tells it."""
        if not observed.ids:
            return
        with suppress(HocketError, TimeoutError):
            async with asyncio.timeout(_CALL_S):
                if await doors[-1].client.cancel(observed.ids[-1]) and not observed.ended:
                    self._end(observed, CANCELLED)

    def _end(self, observed: ObservedCall, how: str, problem: str = "") -> None:
        observed.ended, observed.ended_s = how, self.now_s()
        if problem:
            observed.problem = problem


async def reference_files(
    gateway: Gateway, wanted: Sequence[wishes.MediaWish], seed: int
) -> dict[str, bytes]:
    """The undisturbed file of every wish, made one after the other."""
    found: dict[str, bytes] = {}
    stored = await gateway.client.put_input(uploaded_picture(), tenant=wishes.TENANT)
    for wish in wanted:
        request = wish.asked(f"reference-{seed}-{wish.name}", uploaded=stored.name)
        found[wish.name], _ = await gateway.client.generate_media(request)
    return found
