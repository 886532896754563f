"""What a caller asked for, as a digest: a repeated idempotency key must ask for the same.

It is taken before defaults are filled in, so that an explicit seed counts and a drawn one does not.
What a retry may change stays out: the time that is left, how often progress is told, who waits.
"""

from __future__ import annotations

import hashlib

from hocket.v1.generation_pb2 import GenerateRequest


def digest(request: GenerateRequest) -> bytes:
    """SHA-256 of the caller's own request, serialized deterministically."""
    wish = GenerateRequest()
    wish.CopyFrom(request)
    if wish.HasField("slo"):
        wish.slo.ClearField("deadline_us")
    wish.ClearField("progress_every")
    wish.ClearField("detached")
    wish.ClearField("idempotency_key")
    return hashlib.sha256(wish.SerializeToString(deterministic=True)).digest()
