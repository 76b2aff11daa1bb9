"""Floating point, one operation at a time: words of float32 and float16, and numbers of Python (binary64).

A sum, product or quotient of two float32 numbers, computed in binary64 and rounded once more to binary32, is
the one that binary32 gives: 53 digits are more than 2 * 24 + 2.
"""

from __future__ import annotations

import ctypes
import math
import struct

NAN = 0x7FC00000
SMALLEST_NORMAL = 0x00800000
INFINITY = 0x7F800000
TINY, HUGE = 0x33D6BF95, 0x461C4000  # 1e-7 and 1e4 in binary32


def flush(word: int) -> int:
    """A float32 word with subnormal numbers made zero and every NaN the same."""
    size = word & 0x7FFFFFFF
    if size < SMALLEST_NORMAL:
        return word & 0x80000000
    return NAN if size > INFINITY else word


def value_of(word: int) -> float:
    """The number of a float32 word."""
    number: float = struct.unpack("<f", struct.pack("<I", word))[0]
    return number


def word_of(number: float) -> int:
    """The float32 word nearest to a number, ties to even."""
    if math.isnan(number):
        return NAN
    word: int = struct.unpack("<I", bytes(ctypes.c_float(number)))[0]
    return word


def rounded(number: float) -> float:
    """A number rounded to binary32."""
    return value_of(word_of(number))


def rint(number: float) -> float:
    """The nearest integer, ties to even."""
    if math.isnan(number) or math.isinf(number):
        return number
    return float(round(number))


def clamp(number: float, low: int, high: int) -> int:
    """A code: the integer of a whole number, within bounds; 0 for a NaN."""
    if math.isnan(number):
        return 0
    if number <= low:
        return low
    return high if number >= high else int(number)


def is_nan(word: int) -> bool:
    """Whether a float32 word is a NaN."""
    return word & 0x7FFFFFFF > INFINITY


def to_half(word: int, clamped: bool) -> int:
    """float16 of a float32 word; with `clamped`, tiny and huge numbers are first made less so."""
    sign, size = word & 0x80000000, word & 0x7FFFFFFF
    if size > INFINITY:
        return (word >> 16 & 0x8000) | 0x7E00 | (word >> 13 & 0x3FF)
    if clamped and 0 < size < TINY:
        size = TINY
    elif clamped and size > HUGE:
        size = HUGE
    sign >>= 16
    exponent, fraction = (size >> 23) - 127, (size & 0x7FFFFF) | 0x800000
    if size < SMALLEST_NORMAL or exponent < -25:
        return sign  # below half of the least float16
    if exponent >= 16:
        return sign | 0x7C00
    drop = 13 if exponent >= -14 else 13 - 14 - exponent  # bits of the fraction that do not fit
    kept, rest = fraction >> drop, fraction & ((1 << drop) - 1)
    half = 1 << (drop - 1)
    if rest > half or (rest == half and kept & 1):
        kept += 1
    # A carry out of the fraction goes on into the exponent, as the format is made.
    if exponent >= -14:
        return sign | (((exponent + 14) << 10) + kept)
    return sign | kept


def to_bfloat16(word: int) -> int:
    """bfloat16 of a float32 word."""
    return ((word + 0x7FFF + (word >> 16 & 1)) >> 16) & 0xFFFF


def narrowed(number: float, kind: str) -> int | None:
    """The word of a type nearest to a number, bfloat16 by way of float32; None if it is not finite."""
    if math.isnan(number) or math.isinf(number):
        return None
    if kind == "f16":
        try:
            half: int = struct.unpack("<H", struct.pack("<e", number))[0]
        except OverflowError:
            return None
        return half
    word = word_of(number)
    top, out = (0x7F800000, word) if kind == "f32" else (0x7F80, to_bfloat16(word))
    return None if out & top == top else out


def widened(word: int, kind: str) -> int:
    """The float32 word of a word of 16 bits."""
    if kind == "bf16":
        return word << 16
    sign, exponent, fraction = (word & 0x8000) << 16, word >> 10 & 31, word & 0x3FF
    if exponent == 31:
        return sign | 0x7F800000 | fraction << 13
    if exponent == 0:
        return sign | word_of(fraction * 2.0**-24)
    return sign | (exponent + 112) << 23 | fraction << 13
