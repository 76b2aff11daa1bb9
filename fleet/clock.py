"""Time as the control plane keeps it: integer microseconds since 1970, UTC."""

from __future__ import annotations

import time

from google.protobuf.timestamp_pb2 import Timestamp

SECOND = 1_000_000  # microseconds
# The years that google.protobuf.Timestamp allows: 0001 to 9999.
_LEAST = -62_135_596_800 * SECOND
_MOST = 253_402_300_799 * SECOND


def now_us() -> int:
    """Microseconds since 1970 by this machine's clock."""
    return time.time_ns() // 1000


def to_timestamp(us: int) -> Timestamp:
    """The protobuf form."""
    return Timestamp(seconds=us // SECOND, nanos=us % SECOND * 1000)


def from_timestamp(value: Timestamp) -> int:
    """Microseconds of a timestamp that anyone may have sent; out-of-range ones are clamped."""
    return min(max(value.seconds * SECOND + value.nanos // 1000, _LEAST), _MOST)
