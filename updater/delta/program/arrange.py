"""Runs the planner over two files and numbers the records: the encoder's entry."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from updater.delta.program import planner, predictors, quantising, repeats, scales, stepping, zeroing
from updater.delta.program.operands import Operands
from updater.delta.program.piece import Piece
from updater.delta.program.planner import Item
from updater.delta.program.records import (
    BF16,
    BIAS,
    CAST,
    CODES,
    EXACT,
    EXCEPTIONS,
    F16,
    F32,
    GIVEN,
    HIGHEST,
    I8,
    I32,
    LOWEST,
    NIBBLES,
    PEAK,
    PEAKED,
    PLAIN,
    POOL,
    PRODUCT,
    RANGED,
    REFER,
    RESCALED,
    SAME,
    SELF,
    SOURCES,
    U8,
    Record,
)  # fmt: skip

_SKELETON_BYTES = 1 << 16
_PIECE_BYTES = 40  # what cutting a piece out of an array costs, about
_SINGLES = 300
_SAID = 2  # scales that are said rather than worked out
_LEAST = 64  # bytes of a repeat; four times that where elements are bytes


@dataclass
class Known:
    """What the encoder knows of the base.

    Attributes:
        data: its bytes.
        operands: these, for predictors.
        places: where arrays of float32 lie, by content: the first of equal ones.
    """

    data: NDArray[np.uint8]
    operands: Operands
    places: dict[bytes, int]


def records_for(
    base: Known, target: bytes, new: list[Item], follows: dict[int, tuple[int, int]], window: int
) -> list[Record]:
    """The records of a block.

    Args:
        base: the base.
        target: the block's bytes.
        new: its arrays, places counted from its begin.
        follows: for biases, the tensors whose scales they follow.
        window: bytes of the base that the skeleton is coded against.
    """
    by_owner = {(item.role, item.owner): item for item in new if item.owner >= 0}
    by_content: dict[bytes, list[Item]] = defaultdict(list)
    for item in new:
        if item.dtype == F32 and (len(item.value) <= 1 << 16 or item.weights is not None):
            by_content[item.content].append(item)
    seen: dict[bytes, Item] = {}
    room = scales.room_of(len(target), window, new)
    for item in new:
        if not _equal(item):
            if item.dtype == F32 and item.weights is not None:
                item.record = scales.plan(base.operands, item.value, item.at, item.weights, room)
            if item.record is None:
                _derive(base, item, by_owner, follows, seen)
            if item.record is None:
                zeroing.plan(base.operands, item)
                stepping.plan(item)
            if item.record is None and item.dtype == F32:
                _widen(base, item)
            if item.record is None and item.dtype == F32:
                planner.plan_float(item, base.operands)
                if item.record is not None and item.record.op == PLAIN and _plainly_small(item):
                    item.record = None
        if item.dtype == F32 and item.role != "data":
            seen[item.content] = item
    _singles(new)
    zeros = {item.weights.number: item for item in new if item.weights is not None and item.dtype != F32}
    for item in new:
        if not _equal(item):
            _integers(base, item, by_content, room, zeros)
    return _number(base, _repeated(base, target, new))


def _repeated(base: Known, target: bytes, items: list[Item]) -> list[Item]:
    """Cuts arrays that nothing predicts where their bytes lie elsewhere too."""
    loose = [item for item in items if _loose(item)]
    found = repeats.find(
        base.data,
        target,
        [(item.at, item.value.nbytes) for item in loose],
        [_LEAST * (4 if item.value.itemsize == 1 else 1) for item in loose],
    )
    out = [item for item in items if not _loose(item)]
    index = 0
    for item in loose:
        end = item.at + item.value.nbytes
        pieces: list[Item] = []
        at, width = item.at, item.value.itemsize
        while index < len(found) and found[index].at < end:
            repeat = found[index]
            index += 1
            if not _worthwhile(target[repeat.at : repeat.at + repeat.length]):
                continue
            skip = -(repeat.at - item.at) % width
            begin, size = repeat.at + skip, (repeat.length - skip) // width
            if begin > at:
                pieces.append(_piece(item, at, begin))
            piece = _piece(item, begin, begin + size * width)
            op = SELF if repeat.own else SAME
            piece.record = Record(op, item.dtype, begin, size, base=repeat.source + skip)
            pieces.append(piece)
            at = begin + size * width
        if not pieces:
            out.append(item)
            continue
        if at < end:
            pieces.append(_piece(item, at, end))
        for piece in pieces:
            if piece.record is None and piece.dtype == F32:
                planner.plan_float(piece, base.operands)
            elif piece.record is None:
                planner.plan_codes(piece)
                planner.finish_codes(piece, base.operands)
        out += pieces
    return sorted(out, key=lambda item: item.at)


def _plainly_small(item: Item) -> bool:
    """Whether an array is better left to the skeleton: constants, paddings."""
    if not 16 <= item.value.nbytes <= _SKELETON_BYTES:
        return False
    return len(zstandard.ZstdCompressor(level=9).compress(item.content)) < item.value.nbytes * 6 // 10


def _worthwhile(data: bytes) -> bool:
    """Whether a repeat saves more than a record costs."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256).astype(np.float64)
    used = counts[counts > 0]
    return float(-(used * np.log2(used / used.sum())).sum()) / 8 > _PIECE_BYTES


def _loose(item: Item) -> bool:
    if item.record is None or item.operands or item.dtype in NIBBLES:
        return False
    based = item.record.op == CODES and (item.record.gain_bits != 7 or bool(item.record.gains.any()))
    return item.record.op in (PLAIN, CODES) and not based and item.value.nbytes >= repeats.MIN_LENGTH


def _piece(item: Item, begin: int, end: int) -> Item:
    width = item.value.itemsize
    value = item.value[(begin - item.at) // width : (end - item.at) // width]
    return Item(item.role, item.name, item.dtype, (len(value),), begin, value, item.quantisation)


def _equal(item: Item) -> bool:
    return item.base is not None and item.base.dtype == item.dtype and item.base.content == item.content


def _scale_of(base: Known, item: Item, by_content: dict[bytes, list[Item]], room: scales.Room) -> Item | None:
    if item.quantisation is None:
        return None
    value = np.array(item.quantisation.scales, dtype="<f4")
    found = by_content.setdefault(value.tobytes(), [])
    if not found:  # it lies in another block: a record that works it out, or only says it
        record = None
        if item.base is not None and len(value) > _SAID:
            record = scales.plan(base.operands, value, 0, scales.reduced(item), room)
        if record is None:
            record = Record(GIVEN, F32, 0, len(value), words=value.view("<u4").tolist())
        else:
            record.silent = True
        found.append(Item("given", "", F32, value.shape, 0, value, record=record))
    return min(found, key=lambda other: abs(other.at - item.at))


def _derive(
    base: Known, item: Item, by_owner: dict[tuple[str, int], Item], follows: dict[int, tuple[int, int]],
    seen: dict[bytes, Item],
) -> None:  # fmt: skip
    """What follows exactly from other arrays."""
    if item.dtype != F32 or item.role == "data":
        return
    place = _counterpart(item)
    count = len(item.value)
    if item.role == "scale" and item.owner in follows:
        one, two = (by_owner.get(("scale", owner)) for owner in follows[item.owner])
        if one and two and max(len(one.value), len(two.value)) == count:
            with np.errstate(all="ignore"):
                product = predictors.flush(predictors.flush(one.value) * predictors.flush(two.value))
            if product.tobytes() == item.content:
                item.record = Record(PRODUCT, F32, item.at, count, base=place)
                item.operands = [one, two]
                return
    data = by_owner.get(("data", item.owner))
    if (
        data is not None
        and data.base is not None
        and data.base.dtype in SOURCES
        and data.dtype in (I8, U8, *NIBBLES)
    ):
        op = {"scale": PEAK, "min": LOWEST, "max": HIGHEST}[item.role]
        axis = data.quantisation.axis if data.quantisation else None
        if count == 1 or axis == 0 or axis == len(data.shape) - 1:
            by_rows = count == 1 or axis == 0
            record = Record(
                op, F32, item.at, count, two=len(data.value) // count, by_rows=by_rows, **data.base.operand()
            )
            if predictors.reduce(base.operands, record).tobytes() == item.content:
                item.record = record
                return
    low, peak = by_owner.get(("min", item.owner)), by_owner.get(("max", item.owner))
    if item.role == "scale" and low and peak and len(peak.value) == len(low.value) == count:
        with np.errstate(all="ignore"):
            top = np.maximum(np.abs(predictors.flush(low.value)), np.abs(predictors.flush(peak.value)))
            peaked = predictors.flush(top / np.float32(127))
            ranged = predictors.flush(predictors.flush(peak.value - low.value) / np.float32(255))
        for op, made in ((PEAKED, peaked), (RANGED, ranged)):
            if made.tobytes() == item.content:
                item.record = Record(op, F32, item.at, count, base=place)
                item.operands = [low, peak]
                return
    if item.content in seen:
        item.record = Record(REFER, F32, item.at, count, base=place)
        item.operands = [seen[item.content]]


def _counterpart(item: Item) -> int:
    """Where the base has what an array replaces, without being predicted from it; -1 if nowhere."""
    return item.base.at if item.base is not None and not item.base.axes else -1


def _widen(base: Known, item: Item) -> None:
    """float32 numbers that are those of a 16-bit base."""
    if item.base is None or item.base.dtype not in (F16, BF16):
        return
    record = Record(CAST, F32, item.at, len(item.value), **item.base.operand())
    guess = predictors.cast(base.operands, record, Piece.whole(1, record.count))
    wanted = predictors.ordered(item.value.view("<u4"), 32)
    planner.settle(record, predictors.difference(wanted, predictors.ordered(guess, 32), 32), [1])
    if record.residual != POOL:
        item.record = record


def _singles(items: list[Item]) -> None:
    """Single numbers that are products of two others, as ONNX keeps the scales of biases."""
    if any(item.role != "data" for item in items):
        return
    singles = [item for item in items if item.dtype == F32 and len(item.value) == 1]
    if not 2 < len(singles) <= _SINGLES:
        return
    value = np.concatenate([item.value for item in singles])
    with np.errstate(all="ignore"):
        products = predictors.flush(np.outer(value, value).astype("<f4"))
    made: set[int] = set()
    for index, item in enumerate(singles):
        if item.record is None:
            continue
        rows, columns = np.nonzero(products == item.value[0])
        for one, two in zip(rows.tolist(), columns.tolist()):
            if index in (one, two) or one in made or two in made or item.value[0] == 0:
                continue
            place = _counterpart(item)
            item.record = Record(PRODUCT, F32, item.at, 1, base=place)
            item.operands = [singles[one], singles[two]]
            made.add(index)
            break


def _integers(
    base: Known, item: Item, by_content: dict[bytes, list[Item]], room: scales.Room, zeros: dict[int, Item]
) -> None:
    if item.record is not None:
        return
    if item.role != "data" or (item.base is None and item.dtype not in (I8, U8, *NIBBLES)):
        return
    source, count = item.base, len(item.value)
    scale = _scale_of(base, item, by_content, room)
    if item.dtype in (F16, BF16):
        assert source is not None
        if source.dtype in SOURCES and source.dtype != item.dtype:
            wanted, tries = predictors.ordered(item.value, 16), []
            whole = Piece.whole(1, count)
            for mode in (0, 1) if item.dtype == F16 else (0,):
                record = Record(CAST, item.dtype, item.at, count, zero=mode, **source.operand())
                guess = predictors.ordered(predictors.cast(base.operands, record, whole), 16)
                residual = predictors.difference(wanted, guess, 16)
                tries.append((planner.settle(record, residual, [1]), mode, record))
            item.record = min(tries)[2]
        else:
            planner.plan_float(item, base.operands)
        return
    value = item.value.astype(np.int64)
    if item.dtype == I32 and source is not None:
        if source.dtype in SOURCES and scale is not None and len(scale.value) in (1, count):
            record = Record(BIAS, I32, item.at, count, **source.operand())
            residual = value - predictors.bias(base.operands, record, scale.value, Piece.whole(1, count))
        elif source.dtype == I32 and scale is not None and source.quantisation is not None and count >= 1:
            old = np.array(source.quantisation.scales, dtype="<f4").tobytes()
            place = base.places.get(old, -1)
            if place < 0 or len(old) != scale.value.nbytes:
                return
            record = Record(RESCALED, I32, item.at, count, two=place, **source.operand())
            residual = value - predictors.rescale(base.operands, record, scale.value, Piece.whole(1, count))
        else:
            return
        planner.settle(record, residual, [1])
        item.record, item.operands = record, [scale]
        return
    if item.dtype not in (I8, U8, *NIBBLES) or count < 16:
        return
    if scale is not None and quantising.plan(base.operands, item, scale, zeros):
        return
    if source is not None and source.dtype in SOURCES:
        item.base = None
    planner.plan_codes(item)
    planner.finish_codes(item, base.operands)


def _least(item: Item) -> int:
    """Bytes from which an array that is in the base has a record: the skeleton finds what is in one piece."""
    return planner.LEFT if item.base is not None and item.base.axes else planner.LEFT * 16


def _number(base: Known, items: list[Item]) -> list[Record]:
    """Records in the order of their places, operands numbered."""
    given = {id(one): one for item in items for one in item.operands if one.role == "given"}
    items = [*given.values(), *items]
    wanted = {id(item) for item in items if item.record is not None}
    changed = True
    while changed:
        changed = False
        for item in items:
            if id(item) in wanted:
                for operand in item.operands:
                    if id(operand) not in wanted:
                        wanted.add(id(operand))
                        changed = True
    numbered = []
    for item in items:
        if id(item) in wanted or (_equal(item) and item.length >= _least(item)):
            if item.record is None:
                if not _equal(item):
                    planner.plan_float(item, base.operands)
                    numbered.append(item)
                    continue
                assert item.base is not None
                kind, size = (U8, item.length) if item.dtype in NIBBLES else (item.dtype, len(item.value))
                item.record = Record(SAME, kind, item.at, size, **item.base.operand())
            numbered.append(item)
    places = {id(item): number for number, item in enumerate(numbered)}
    out = []
    for item in numbered:
        assert item.record is not None
        if item.operands:
            item.record.one = places[id(item.operands[0])]
        if len(item.operands) > 1:
            item.record.two = places[id(item.operands[1])]
        out.append(item.record)
    return out


__all__ = ["EXACT", "EXCEPTIONS", "records_for"]
