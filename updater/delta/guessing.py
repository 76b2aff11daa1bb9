"""Finds arrays of floats in files that no reader knows, and between the tensors of files that one knows.

Order: of a zip file, the entries that are stored as they are, with their names; then the arrays of the other
file are looked for, cast to other types; what is left is cut into windows, and the entropies of their bytes
by place in a word tell the width, the bits of the exponents the type. Rules: a guess may be wrong, and then
costs: between tensors lie tables of a graph that look like floats; so the caller codes blocks with guesses
between tensors also without them and keeps what is smaller; equal files give equal guesses; work is linear in
the file, and what is searched is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.formats import read_model, stored_zip
from updater.formats.span import TensorSpan

Bytes = NDArray[np.uint8]

_LEAST_GAP = 16 << 10  # bytes of a file from which arrays are looked for in it
_WINDOW = 4096  # bytes whose entropies are measured together
_WINDOWS = 64  # windows measured at a time
_LEAST_ENTRY = 256  # bytes of an entry that is judged without entropies
_APART = 1.0  # bits by which the top byte of a word is more regular than the one half a word below
_GAIN = 0.1  # bits a byte by which words must be more regular than bytes
_PLAUSIBLE = 0.97  # share of the words that must look like numbers
_EDGE = 0.9  # ... of a part of a window at an array's edge, for it to belong to it as a whole
_PROBE = 32  # bytes by which an array of the other file is found
_VARIED = 12  # different bytes of a probe
_CLOSE = 0.98  # share of the bytes that must agree where the probe was found
_SEARCH_BYTES = 1 << 30  # searched for arrays of the other file, all probes together, in regions of ...
_SEARCHED_BYTES = 64 << 20  # ... so many bytes at most
_LEAST_ARRAY = 256  # bytes of an array that is searched for


@dataclass(frozen=True)
class _Region:
    """Bytes where arrays are looked for, and the name of the entry they are; "" if none."""

    start: int
    end: int
    name: str = ""


def known_spans(path: Path) -> tuple[TensorSpan, ...]:
    """The tensors that a reader finds in a file; none if its format is unknown or broken."""
    try:
        return read_model(path).spans
    except SluiceError as error:
        if error.reason in (errors_pb2.MODEL_FILE_INVALID, errors_pb2.MODEL_FILE_TRUNCATED):
            return ()
        raise


def with_guesses(
    data: Bytes,
    spans: Sequence[TensorSpan],
    other: Bytes,
    other_spans: Sequence[TensorSpan],
    *,
    between: bool = False,
) -> tuple[TensorSpan, ...]:
    """A file's spans, or where a reader found none those that are guessed: by offset, without overlap.

    Args:
        data: the file's bytes.
        spans: what a reader found in it.
        other: the bytes of the file that it is compared with.
        other_spans: what a reader found in that.
        between: adds what is guessed between the tensors that a reader found.
    """
    if spans and not between:
        return tuple(spans)
    ordered = sorted(spans, key=lambda span: span.offset)
    regions = _named(data, list(_gaps(ordered, len(data))))
    found = list(_searched(data, regions, other, other_spans))
    taken = sorted(found, key=lambda span: span.offset)
    for region in regions:
        inside = [span for span in taken if region.start <= span.offset < region.end]
        for part in _gaps(inside, region.end, region.start, least=_LEAST_ENTRY):
            found += _guessed(data, _Region(part.start, part.end, region.name))
    return tuple(sorted([*spans, *found], key=lambda span: span.offset)) if found else tuple(spans)


def _gaps(
    spans: Sequence[TensorSpan], end: int, start: int = 0, least: int = _LEAST_GAP
) -> Iterator[_Region]:
    for span in spans:
        if span.offset - start >= least:
            yield _Region(start, span.offset)
        start = max(start, span.offset + span.length)
    if end - start >= least:
        yield _Region(start, end)


def _named(data: Bytes, gaps: list[_Region]) -> list[_Region]:
    """Gaps; of a zip file that is one gap, its stored entries."""
    if gaps != [_Region(0, len(data))] or data[:2].tobytes() != b"PK":
        return gaps
    entries = stored_zip.entries(data.data)
    regions = [_Region(entry.offset, entry.offset + entry.length, entry.name) for entry in entries]
    return [region for region in regions if region.end - region.start >= _LEAST_ENTRY] or gaps


def _searched(
    data: Bytes, regions: Sequence[_Region], other: Bytes, other_spans: Sequence[TensorSpan]
) -> Iterator[TensorSpan]:
    """Arrays of the other file that lie in the regions, in another type."""
    left = _SEARCH_BYTES
    if sum(region.end - region.start for region in regions) > _SEARCHED_BYTES:
        return
    texts = [(region, data[region.start : region.end].tobytes()) for region in regions]
    longest = max((len(text) for _, text in texts), default=0)
    taken: list[tuple[int, int]] = []
    for span in sorted(other_spans, key=lambda span: -span.length):
        if span.length < _LEAST_ARRAY:
            break
        if span.length > 2 * longest:  # no cast makes an array shorter than half
            continue
        for dtype, content in _casts(other, span):
            for region, text in texts:
                if len(content) > len(text):
                    continue
                left -= len(text)
                if left < 0:
                    return
                at = _place(text, content)
                if at < 0:
                    continue
                start, end = region.start + at, region.start + at + len(content)
                if all(end <= first or start >= last for first, last in taken):
                    taken.append((start, end))
                    yield TensorSpan(span.name, dtype, span.shape, start, len(content))


def _casts(data: Bytes, span: TensorSpan) -> Iterator[tuple[str, bytes]]:
    """An array in the types that models are converted to, or from."""
    raw = data[span.offset : span.offset + span.length]
    with np.errstate(all="ignore"):
        if span.dtype == "float32":
            words = raw.view("<u4")
            yield "float16", raw.view("<f4").astype("<f2").tobytes()
            odd = (words >> np.uint32(16)) & np.uint32(1)
            yield "bfloat16", ((words + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2").tobytes()
        elif span.dtype == "float16":
            yield "float32", raw.view("<f2").astype("<f4").tobytes()
        elif span.dtype == "bfloat16":
            yield "float32", (raw.view("<u2").astype("<u4") << np.uint32(16)).tobytes()


def _place(text: bytes, content: bytes) -> int:
    """Where nearly all of `content` lies in `text`; -1 if nowhere."""
    for start in (0, len(content) // 3 // 8 * 8, len(content) * 2 // 3 // 8 * 8):
        probe = content[start : start + _PROBE]
        if len(set(probe)) < _VARIED:
            continue
        at = text.find(probe) - start
        if at < 0 or at + len(content) > len(text):
            return -1
        ours = np.frombuffer(text, dtype=np.uint8, count=len(content), offset=at)
        return at if (ours == np.frombuffer(content, dtype=np.uint8)).mean() >= _CLOSE else -1
    return -1


def _guessed(data: Bytes, region: _Region) -> Iterator[TensorSpan]:
    """The arrays of a region by the statistics of its bytes."""
    if region.end - region.start < _WINDOW:
        words = data[region.start : region.end]
        whole = region.name and len(words) % 4 == 0 and _plausible(words, "float32")
        if whole and 0 < np.count_nonzero(words[3::4] & 0x80) < len(words) // 4:
            yield _span(region, "float32", region.start, region.end, 0)
        return
    runs: list[tuple[str, int, int]] = []  # type, begin, end: whole windows, then words at their edges
    for start, width, phase in _widths(data, region):
        first = start + phase
        part = data[first : first + (start + _WINDOW - first) // width * width]
        dtype = _type(part, width)
        if not dtype:
            continue
        last = runs[-1] if runs else None
        if last and last[0] == dtype and (first - last[1]) % width == 0 and first - last[2] <= width:
            runs[-1] = (dtype, last[1], first + len(part))
        else:
            runs.append((dtype, first, first + len(part)))
    floor = region.start
    for number, (dtype, begin, end) in enumerate(runs):
        ceiling = runs[number + 1][1] if number + 1 < len(runs) else region.end
        width = _WIDTHS[dtype]
        if width > 2:  # text, too, looks like numbers of 16 bits
            begin -= _edge(data[max(floor, begin - _WINDOW) : begin], dtype, ahead=False)
            end += _edge(data[end : min(ceiling, end + _WINDOW)], dtype, ahead=True)
        floor = end
        assert (end - begin) % width == 0
        yield _span(region, dtype, begin, end, number)


def _span(region: _Region, dtype: str, begin: int, end: int, number: int) -> TensorSpan:
    name = f"{region.name}:{number}" if region.name and number else region.name
    return TensorSpan(name, dtype, ((end - begin) // _WIDTHS[dtype],), begin, end - begin)


def _widths(data: Bytes, region: _Region) -> Iterator[tuple[int, int, int]]:
    """Windows that consist of words: (place, bytes of a word, place of the first word in the window)."""
    count = (region.end - region.start) // _WINDOW
    for first in range(0, count, _WINDOWS):
        size = min(_WINDOWS, count - first)
        start = region.start + first * _WINDOW
        part = data[start : start + size * _WINDOW].reshape(size, _WINDOW // 8, 8).astype(np.int64)
        places = np.arange(size)[:, None, None] * 8 + np.arange(8)
        counts = np.bincount((places * 256 + part).reshape(-1), minlength=size * 2048).reshape(size, 8, 256)
        planes = {8: counts}
        for width in (4, 2, 1):
            planes[width] = planes[2 * width][:, :width] + planes[2 * width][:, width:]
        entropies = {width: _entropy(planes[width]) for width in planes}
        for number in range(size):
            for width in (8, 4, 2):
                bits = entropies[width][number]
                top = int(np.argmin(bits))
                apart = bits[(top - width // 2) % width] - bits[top]
                if apart > _APART and bits.mean() < entropies[1][number, 0] - _GAIN:
                    yield start + number * _WINDOW, width, (top + 1) % width
                    break


def _entropy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits of a symbol of each histogram, corrected for how few symbols it has (Miller, Madow)."""
    total = counts.sum(axis=-1).astype(np.float64)
    sums = (counts * np.log2(np.maximum(counts, 1))).sum(axis=-1)
    few = (np.count_nonzero(counts, axis=-1) - 1) / (2 * np.log(2) * total)
    out: NDArray[np.float64] = np.log2(total) - sums / total + few
    return out


_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Of each type the bits right of the exponent, the exponent's own, and the least and greatest of numbers that
# models have.
_EXPONENTS = {
    "float64": (52, 0x7FF, 1023 - 60, 1023 + 60),
    "float32": (23, 0xFF, 127 - 40, 127 + 40),
    "bfloat16": (7, 0xFF, 127 - 24, 127 + 8),
    "float16": (10, 0x1F, 1, 30),
}


def _type(part: Bytes, width: int) -> str:
    """The type of words of that many bytes; "" if they are no floats."""
    kinds = (dtype for dtype, size in _WIDTHS.items() if size == width)
    return next((dtype for dtype in kinds if _plausible(part, dtype)), "")


def _looks(part: Bytes, dtype: str) -> NDArray[np.bool_]:
    """Which words are zero or have an exponent that numbers of a model have."""
    words: NDArray[Any] = np.ascontiguousarray(part).view(f"<u{_WIDTHS[dtype]}")
    bits, mask, least, greatest = _EXPONENTS[dtype]
    kind = words.dtype.type
    exponents = (words >> kind(bits)) & kind(mask)
    zero = (words << kind(1)) == 0
    looks: NDArray[np.bool_] = ((exponents >= least) & (exponents <= greatest)) | zero
    return looks


def _plausible(part: Bytes, dtype: str) -> bool:
    return bool(_looks(part, dtype).mean() >= _PLAUSIBLE)


def _edge(part: Bytes, dtype: str, ahead: bool) -> int:
    """How many bytes at the begin (`ahead`) or the end of a part of a window go on with an array."""
    size = len(part) // _WIDTHS[dtype] * _WIDTHS[dtype]
    if not size:
        return 0
    looks = _looks(part[:size] if ahead else part[len(part) - size :], dtype)
    if looks.mean() >= _EDGE and size == len(part) and size < _WINDOW:
        return size
    run = looks if ahead else looks[::-1]
    stop = len(run) if run.all() else int(np.argmin(run))
    return stop * _WIDTHS[dtype]
