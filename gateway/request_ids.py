"""Names of requests: ULIDs, so that they sort by time and two gateways never draw the same one."""

from __future__ import annotations

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case
_PAIRS = tuple(one + other for one in _ALPHABET for other in _ALPHABET)
_RANDOM_BITS = 80
_SHIFTS = tuple(range(120, -1, -10))  # of 26 characters, two at a time


def request_id(unix_ns: int, random_bits: int) -> str:
    """26 characters: 48 bits of milliseconds since 1970, then 80 random bits."""
    number = (unix_ns // 1_000_000) << _RANDOM_BITS | random_bits & ((1 << _RANDOM_BITS) - 1)
    return "".join([_PAIRS[number >> shift & 1023] for shift in _SHIFTS])
