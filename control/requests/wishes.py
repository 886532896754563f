"""What a caller asked for, as a digest: a repeated idempotency key must ask for the same.

Taken over the caller's own request, before any default is filled in, so that an explicit seed
counts and a drawn one does not. What a retry may change stays out of it: the time
that is left, how often progress is told, whether anybody waits.
"""

from __future__ import annotations

import hashlib

from hocket.v1 import control_pb2, generation_pb2


def digest(submit: control_pb2.SubmitRequest) -> bytes:
    """SHA-256 of the wish: as the gateway says it, else over the request as it stands here."""
    if submit.wish_sha256:
        return submit.wish_sha256
    wish = generation_pb2.GenerateRequest()
    wish.CopyFrom(submit.request)
    wish.slo.ClearField("deadline_us")
    for field in ("progress_every", "detached", "idempotency_key"):
        wish.ClearField(field)
    wish.spec.ClearField("guidance_branches")  # control's own
    return hashlib.sha256(wish.SerializeToString(deterministic=True)).digest()
