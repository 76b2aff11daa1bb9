"""The instruction tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.fault import OVER_LIMIT, UNSUPPORTED, check
from edge_tests.conformance.plain.reader import Reader, unfold

PLAIN, DIFFERENCE, REQUANTISE = 0, 1, 2
DENSE, SPARSE = 0, 1
UNSIGNED, SIGNED, FLOAT = 0, 1, 2
WIDTHS = (1, 2, 4, 8)
MAX_MULTIPLIER = 1 << 30
MAX_ZERO_POINT = 1 << 31
MAX_SHIFT = 62


class Places(Protocol):
    """The cursor of a block."""

    def base_offset(self, listing: Reader) -> int: ...


@dataclass
class Requantisation:
    """The parameters of the predictor requantise."""

    start: int
    inner: int
    shift: int
    multipliers: list[int]
    old_zeros: list[int]
    new_zeros: list[int]


def order(word: int, reading: int, bits: int) -> int:
    """A bit pattern's place in the order of its type's values."""
    if reading != FLOAT:
        return word
    half = 1 << (bits - 1)
    return word ^ (2 * half - 1) if word >= half else word + half


def unorder(key: int, reading: int, bits: int) -> int:
    """The bit pattern at a place."""
    if reading != FLOAT:
        return key
    half = 1 << (bits - 1)
    return key ^ (2 * half - 1) if key < half else key - half


def read_tensor(
    listing: Reader, streams: list[Reader], features: list[str], cursor: Places, room: int, base: bytes
) -> bytes:
    """Reads the instruction behind its opcode; gives what it writes."""
    predictor, coding, number = listing.byte(), listing.byte(), listing.byte()
    check(predictor <= REQUANTISE and coding <= SPARSE and number <= 11, "not known", UNSUPPORTED)
    width, reading = WIDTHS[number // 3], number % 3
    count = _positive(listing)
    offset = cursor.base_offset(listing) if predictor != PLAIN else 0
    gap_bytes = listing.varint() if coding == SPARSE else 0
    named = [_stream(listing, streams) for _ in range(width + (1 if coding == SPARSE else 0))]
    shape = None
    if predictor == REQUANTISE:
        check("requantise" in features, "the feature requantise is not named")
        check(reading != FLOAT and width <= 4, "elements that cannot be requantised")
        shape = _requantisation(listing, streams)
    check(count * width <= room, "a tensor writes beyond its block")
    if predictor != PLAIN:
        check(offset + count * width <= len(base), "a range lies outside the base")
    if coding == DENSE:
        planes = [stream.take(count) for stream in named]
        folded = [_word(planes, index) for index in range(count)]
    else:
        folded = _sparse(named[0].take(gap_bytes), named[1:], count)
    bits, out = 8 * width, bytearray()
    for index in range(count):
        guess = 0
        if predictor != PLAIN:
            at = offset + index * width
            guess = int.from_bytes(base[at : at + width], "little")
            if shape is not None:
                guess = _requantised(guess, index, shape, reading, bits)
        key = (order(guess, reading, bits) + unfold(folded[index])) % (1 << bits)
        out += unorder(key, reading, bits).to_bytes(width, "little")
    return bytes(out)


def _positive(listing: Reader) -> int:
    value = listing.varint()
    check(1 <= value <= limits.MAX_TARGET_BYTES, "a count is out of its range")
    return value


def _stream(listing: Reader, streams: list[Reader]) -> Reader:
    number = listing.varint()
    check(1 <= number < len(streams), "an instruction names a stream that is not there")
    return streams[number]


def _word(planes: list[bytes], index: int) -> int:
    value = 0
    for place, plane in enumerate(planes):
        value |= plane[index] << (8 * place)
    return value


def _sparse(gaps: bytes, streams: list[Reader], count: int) -> list[int]:
    check(not gaps or gaps[-1] != 255, "a stream of gaps ends inside a gap")
    places, at = [], 0
    for byte in gaps:
        at += byte
        if byte < 255:
            check(at < count, "a gap leads beyond its instruction")
            places.append(at)
            at += 1
    planes = [stream.take(len(places)) for stream in streams]
    folded = [0] * count
    for index, place in enumerate(places):
        folded[place] = (_word(planes, index) + 1) % (1 << (8 * len(planes)))
    return folded


def _requantisation(listing: Reader, streams: list[Reader]) -> Requantisation:
    numbers = _stream(listing, streams)
    start, inner = listing.varint(), _positive(listing)
    channels, shift, many = _positive(listing), listing.varint(), listing.byte()
    check(channels <= limits.MAX_CHANNELS, "too many channels", OVER_LIMIT)
    check(shift <= MAX_SHIFT and many <= 1, "numbers out of their range")
    check(start <= limits.MAX_TARGET_BYTES, "a start out of its range")
    multipliers = [numbers.signed() + (1 << shift) for _ in range(channels)]
    zeros = channels if many else 1
    old = [numbers.signed() for _ in range(zeros)]
    new = [numbers.signed() for _ in range(zeros)]
    check(all(1 <= m <= MAX_MULTIPLIER for m in multipliers), "a multiplier out of its range")
    check(all(abs(z) <= MAX_ZERO_POINT for z in old + new), "a zero point out of its range")
    return Requantisation(start, inner, shift, multipliers, old, new)


def _requantised(word: int, index: int, shape: Requantisation, reading: int, bits: int) -> int:
    low = -(1 << (bits - 1)) if reading == SIGNED else 0
    high = (1 << (bits - 1)) - 1 if reading == SIGNED else (1 << bits) - 1
    code = word - (1 << bits) if word > high else word
    channel = (shape.start + index) // shape.inner % len(shape.multipliers)
    zero = channel if len(shape.old_zeros) > 1 else 0
    value = (code - shape.old_zeros[zero]) * shape.multipliers[channel]
    if shape.shift:
        value = (value + (1 << (shape.shift - 1))) >> shape.shift
    value = min(high, max(low, value + shape.new_zeros[zero]))
    return value % (1 << bits)
