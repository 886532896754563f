"""Names of requests: ULIDs, so that they sort by time and two gateways never draw the same one."""

from __future__ import annotations

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case
_RANDOM_BITS = 80
_LENGTH = 26


def request_id(unix_ns: int, random_bits: int) -> str:
    """26 characters: 48 bits of milliseconds since 1970, then 80 random bits."""
    number = (unix_ns // 1_000_000) << _RANDOM_BITS | random_bits & ((1 << _RANDOM_BITS) - 1)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(5 * (_LENGTH - 1), -1, -5))
