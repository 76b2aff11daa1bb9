"""The bytes between records."""

from __future__ import annotations

from dataclasses import dataclass

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.arithmetic import Arithmetic, budget
from edge_tests.conformance.plain.byte_model import MODEL_LIMIT, Mixer, Skeleton
from edge_tests.conformance.plain.fault import OVER_LIMIT, check
from edge_tests.conformance.plain.record import REDUCED, Record, bytes_of
from edge_tests.conformance.plain.stream import decode_frame
from edge_tests.conformance.plain.tracking import Tracked

RAW, ZSTD_REST, ZSTD_WHOLE, MODEL, TRACKED = 0, 1, 2, 3, 4


@dataclass
class Window:
    """Bytes of the base, and where they begin."""

    data: bytes
    begin: int


def rest_of(window: Window, records: list[Record]) -> bytes:
    """The window without the arrays that records stand for."""
    ranges = []
    for record in records:
        if record.base is None or record.op in (*REDUCED, "self", "given"):
            continue
        begin = record.base - window.begin
        end = begin + bytes_of(record.source_type, record.span)
        begin, end = max(begin, 0), min(end, len(window.data))
        if begin < end:
            ranges.append((begin, end))
    ranges.sort(key=lambda item: (item[0], -item[1]))
    rest, last = b"", 0
    for begin, end in ranges:
        if begin >= last:
            rest += window.data[last:begin]
            last = end
    return rest + window.data[last:]


def decode_skeleton(data: bytes, size: int, window: Window, records: list[Record], tracks: bool) -> bytes:
    """`size` bytes; `tracks`: the feature tracking is named."""
    check(len(data) >= 1, "a program has no skeleton")
    way, body = data[0], data[1:]
    check(way <= MODEL or (way == TRACKED and tracks), "a skeleton is coded in a way that is not known")
    if way == RAW:
        check(len(body) == size, "a skeleton has another size")
        return body
    if way == ZSTD_WHOLE:
        return decode_frame(body, size, window.data)
    rest = rest_of(window, records)
    if way == ZSTD_REST:
        return decode_frame(body, size, rest)
    check(size <= limits.MAX_MODELLED_BYTES, "a skeleton models too many bytes", OVER_LIMIT)
    check(len(rest) <= limits.MAX_MODEL_WINDOW_BYTES, "a skeleton looks at too many bytes", OVER_LIMIT)
    coder = Arithmetic(body, MODEL_LIMIT, budget(size))
    out = (Tracked if way == TRACKED else Skeleton)(Mixer(coder), coder, rest).decode(size)
    coder.end()
    return out
