"""Bytes between tensors, coded knowing the base's: predicted from where the last agreement leads, else
modelled.

No copies are sent. Both sides keep two places in what is known (the base's bytes, then those written so
far): the
alignment, which goes on through differences as long as it agrees now and then, and the place where the last
six bytes occurred most recently. A place that agreed for a while predicts the next byte, and one modelled
bit says
whether it is right; otherwise the byte goes through ByteModel, which sees what both places hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from updater import limits
from updater.delta.program.arithmetic import Coder
from updater.delta.program.bytemodel import ByteModel

MATCH = 6  # bytes that lead to a place
SURE = 6  # bytes that must have agreed before one bit decides
LONG = 32


@dataclass
class Place:
    """A place in what is known, how long it agreed, and its last eight outcomes."""

    at: int
    run: int
    history: int = 0


def bucket(run: int) -> int:
    """The context of an agreement of that length."""
    return run if run < 16 else 12 + min(14, run.bit_length())


def code(coder: Coder, base: bytes, size: int, target: bytes | None) -> bytes:
    """Writes `target`, of `size` bytes, or reads it."""
    out = bytearray(base)
    edge = len(base)
    model = ByteModel(coder, limits.MAX_MIXED_BYTES)
    # The latest place behind each six bytes that occur.
    seen = {base[place - MATCH : place]: place for place in range(MATCH, edge)}
    aligned = Place(0 if base else -1, LONG)
    found = Place(-1, 0)
    while len(out) < edge + size:
        here = len(out)
        given = target[here - edge] if target is not None else 0
        if found.at < 0 and here >= MATCH:
            found = look(out, seen)
        if aligned.run < found.run and found.at >= 0 and aligned.run < 16 and found.run >= 16:
            aligned = Place(found.at, found.run, 0)
        if aligned.at >= here:
            aligned = Place(-1, 0)
        first = out[aligned.at] if aligned.at >= 0 else -1
        second = out[found.at] if found.at >= 0 else -1
        best, byte = (aligned, first) if aligned.run >= found.run or found.at < 0 else (found, second)
        agree = 2 if first == second else int(second >= 0)
        if (
            byte >= 0
            and best.run >= SURE
            and coder.bit(
                ("hit", best is aligned, agree, bucket(best.run), best.history & 3), int(given == byte)
            )
        ):
            pass
        else:
            surely = byte if byte >= 0 and best.run >= SURE else -1
            byte = _modelled(model, out, edge, aligned, found, surely, given)
        out.append(byte)
        seen[bytes(out[-MATCH - 1 : -1])] = here
        if aligned.at >= 0:
            right = first == byte
            aligned.history = (aligned.history << 1 | (not right)) & 255
            aligned.run = aligned.run + 1 if right else 0 if aligned.run < 16 else aligned.run // 4
            aligned.at += 1
            if aligned.history == 255 and found.at >= 0 and second == byte:
                aligned = Place(found.at + 1, found.run)
        if found.at >= 0:
            found = Place(found.at + 1, found.run + 1) if second == byte else Place(-1, 0)
    return bytes(out[edge:])


def look(out: bytearray, seen: dict[bytes, int]) -> Place:
    """Where the last bytes of `out` occurred most recently; no place (-1) if nowhere."""
    at = seen.get(bytes(out[-MATCH:]), -1)
    return Place(at, agreement(out, at))


def agreement(out: bytearray, at: int) -> int:
    """How many bytes before a place, up to LONG, are those at the end of `out`."""
    run, end = 0, len(out)
    while run < LONG and at - 1 - run >= 0 and out[at - 1 - run] == out[end - 1 - run]:
        run += 1
    return run


def _word(out: bytearray, place: int) -> int:
    return int.from_bytes(out[place : place + 4], "little") if place >= 0 else 0


def _modelled(
    model: ByteModel, out: bytearray, edge: int, aligned: Place, found: Place, excluded: int, given: int
) -> int:
    size, place = len(out), aligned.at
    guess = out[place] if place >= 0 else 0
    lane = (size - edge) & 3
    last, older = _word(out, size - 4 - lane), _word(out, size - 8 - lane)
    line = ((2 * last - older) >> 8 * lane) & 255
    moved = ((_word(out, place - lane) + last - _word(out, place - lane - 4)) >> 8 * lane) & 255
    four = out[-4] if size >= 4 else 0
    special = (moved << 3 | lane << 1 | int(moved == guess), line << 10 | lane << 8 | four)
    return mixed(model, out, edge, (aligned, found), special, excluded, given)


def mixed(
    model: ByteModel,
    out: bytearray,
    edge: int,
    places: tuple[Place, Place],
    special: tuple[int, int],
    excluded: int,
    given: int,
) -> int:
    """The next byte, through all models.

    Args:
        model: the models.
        out: the bytes known and written.
        edge: how many of these are the base's.
        places: the one that goes on through differences, and the one found by content.
        special: contexts beside those that every skeleton has.
        excluded: a byte that it is not, or -1.
        given: the byte to write.
    """
    aligned, found = places
    size, place = len(out), aligned.at
    guess = out[place] if place >= 0 else 0
    predicted = out[found.at] if found.at >= 0 else -1
    one, two, three, four = (tuple(out[-4:]) if size >= 4 else (0, 0, 0, 0))[::-1]
    after = out[place + 1] if place >= 0 and place + 1 < size else 0
    before = out[place - 1] if place > 0 else 0
    lane = (size - edge) & 3
    missed = excluded + 1
    state = min(aligned.run, 3) << 2 | min(found.run, 15) >> 2
    contexts = (
        lane | (missed > 0) << 2,
        guess << 11 | one << 3 | (missed > 0) << 2,
        guess << 6 | lane << 4 | state,
        one << 2 | lane,
        one << 8 | two,
        one << 16 | two << 8 | three,
        four << 10 | lane << 8 | one,
        guess << 16 | after << 8 | before,
        (predicted + 1) << 5 | min(found.run, 24),
        *special,
        missed << 3 | lane,
    )
    if missed:
        return model.code(contexts, 12 + lane, -1, given)
    strength = min(3, found.run // 4) if found.at >= 0 else 0
    return model.code(contexts, strength * 4 + lane, predicted if found.at >= 0 else guess, given)
