"""Options that both ends of Hocket's own gRPC connections agree on.

A peer whose host vanished without closing, or whose process stands still, is noticed by keepalive
pings of either side; the server must be told to allow them.
"""

from __future__ import annotations

MESSAGE_BYTES_MAX = 4 << 20  # media travel in chunks far below this
CALLS_WAITING_MAX = 65_536  # calls that no handler has picked up yet

# A gateway that stands still must be noticed while control still waits for its followers to come
# back (`follower_grace_us`, from the third second of its silence on).
NOTICED_MS_MAX = 6_000
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", NOTICED_MS_MAX // 2),
    ("grpc.keepalive_timeout_ms", NOTICED_MS_MAX // 2),
    ("grpc.http2.ping_timeout_ms", NOTICED_MS_MAX // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # its minute is what counts, not the line above
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # two servers on one port is a mistake, not a feature
    # Of a burst, grpc's core cancels calls that no handler has picked up yet: at random from 1,000
    # waiting ones on, all from 3,000 on, and what has waited 30 s. Refusing is the handlers' part:
    # they say why, and when another try is worth it.
    ("grpc.server.max_pending_requests", CALLS_WAITING_MAX),
    ("grpc.server.max_pending_requests_hard_limit", CALLS_WAITING_MAX),
    ("grpc.server_max_unrequested_time_in_server", 300),
]


def server_options(keepalive_s: float) -> list[tuple[str, int]]:
    """SERVER_OPTIONS with other pings: each so long after the last word of a peer, which has half
    as long for its answer.
    """
    wait_ms = max(1, round(keepalive_s * 1000))
    pings = {
        "grpc.keepalive_time_ms": wait_ms,
        "grpc.keepalive_timeout_ms": max(1, wait_ms // 2),
        "grpc.http2.ping_timeout_ms": max(1, wait_ms // 2),
    }
    return list({**dict(SERVER_OPTIONS), **pings}.items())
