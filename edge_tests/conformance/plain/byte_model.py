"""The byte model: a skeleton byte by byte, by places that agree or by models that are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_tests.conformance.plain import limits
from edge_tests.conformance.plain.arithmetic import Arithmetic, rate
from edge_tests.conformance.plain.fault import OVER_LIMIT, check

MODEL_LIMIT = 250
MATCH = 6
LONG = 32
CURVE = (
    *(1, 2, 3, 6, 10, 16, 27, 45, 73, 120, 194, 310, 488, 747, 1101, 1546, 2047),
    *(2549, 2994, 3348, 3607, 3785, 3901, 3975, 4024, 4050, 4068, 4079, 4085, 4089, 4092, 4093, 4094),
)
FIRST_WEIGHT = 19660


def squash(value: int) -> int:
    """A probability of 12 bits."""
    value = min(2047, max(-2047, value))
    index, part = (value >> 7) + 16, value & 127
    return (CURVE[index] * (128 - part) + CURVE[index + 1] * part + 64) >> 7


def stretches() -> list[int]:
    """For each probability the least value that squash takes as far."""
    out, value = [], -2047
    for probability in range(4096):
        while value < 2047 and squash(value) < probability:
            value += 1
        out.append(value)
    return out


STRETCH = stretches()


@dataclass
class Place:
    """A place in what is known, how long it agreed, and where it was wrong of late."""

    at: int
    run: int
    history: int = 0


def bucket(run: int) -> int:
    """The context that the length of an agreement makes."""
    return run if run < 16 else 12 + min(14, run.bit_length())


class Mixer:
    """Codes one byte at a time by twelve mixed models."""

    def __init__(self, coder: Arithmetic) -> None:
        self.coder = coder
        self.left = limits.MAX_MIXED_BYTES
        self.entries: dict[tuple[int, int, int], list[int]] = {}
        self.weights: dict[tuple[int, int, int], list[int]] = {}

    def decode(self, contexts: Sequence[int], selector: int, expected: int) -> int:
        self.left -= 1
        check(self.left >= 0, "a skeleton mixes too many bytes", OVER_LIMIT)
        partial = 1
        for place in range(8):
            hit = 2
            if expected >= 0:
                hit = 1 if (expected | 256) >> (8 - place) == partial else 0
            entries, inputs = [], []
            for model, context in enumerate(contexts):
                entry = self.entries.setdefault((model, context, partial), [32768, 0])
                entries.append(entry)
                probability, visits = entry
                stretched = STRETCH[probability >> 4]
                inputs.append(stretched if visits > 2 else stretched * visits // 3)
                sure = visits > 2 and (probability < 2048 or probability > 63488)
                inputs.append(stretched >> 1 if sure else 0)
            chosen = (selector, hit, place if hit == 1 else 0)
            weights = self.weights.setdefault(chosen, [FIRST_WEIGHT] * len(inputs))
            total = sum(weight * value for weight, value in zip(weights, inputs, strict=True))
            mixed = squash(total >> 16)
            bit = self.coder.decide(min(65511, max(24, mixed << 4 | 8)))
            error = ((bit << 12) - mixed) * 14
            for index, value in enumerate(inputs):
                weights[index] += (value * error + 8192) >> 14
            for entry in entries:
                entry[0] += ((65535 if bit else 0) - entry[0]) * rate(entry[1]) >> 16
                entry[1] = min(entry[1] + 1, MODEL_LIMIT)
            partial = 2 * partial + bit
        return partial - 256


class Skeleton:
    """Bytes that follow those of `rest`."""

    def __init__(self, mixer: Mixer, coder: Arithmetic, rest: bytes) -> None:
        self.mixer = mixer
        self.coder = coder
        self.edge = len(rest)
        self.out = bytearray(rest)
        self.seen: dict[bytes, int] = {}
        for place in range(MATCH, self.edge):
            self.seen[rest[place - MATCH : place]] = place
        self.aligned = Place(0 if rest else -1, LONG)
        self.found = Place(-1, 0)

    def decode(self, size: int) -> bytes:
        """The next `size` bytes."""
        for _ in range(size):
            self._step()
        return bytes(self.out[self.edge :])

    def _step(self) -> None:
        here = len(self.out)
        if self.found.at < 0 and here >= MATCH:
            self._look(here)
        if self.found.at >= 0 and self.aligned.run < 16 <= self.found.run:
            self.aligned = Place(self.found.at, self.found.run)
        if self.aligned.at >= here:
            self.aligned = Place(-1, LONG)
        aligned, found = self.aligned, self.found
        first = self.out[aligned.at] if aligned.at >= 0 else -1
        second = self.out[found.at] if found.at >= 0 else -1
        if aligned.run >= found.run or found.at < 0:
            best, sure, which = aligned, first, 1
        else:
            best, sure, which = found, second, 0
        if best.run < MATCH:
            sure = -1
        agree = 2 if first == second else 1 if second >= 0 else 0
        if sure >= 0 and self.coder.bit("hit", which, agree, bucket(best.run), best.history & 3):
            byte = sure
        else:
            byte = self._mixed(here, first, second, sure)
        self.out.append(byte)
        if here >= MATCH:
            self.seen[bytes(self.out[here - MATCH : here])] = here
        self._move(first, second, byte)

    def _look(self, here: int) -> None:
        at = self.seen.get(bytes(self.out[here - MATCH : here]), -1)
        self.found = Place(at, self._agreement(at, here))

    def _agreement(self, at: int, here: int) -> int:
        """How many bytes before a place are those before `here`."""
        run = 0
        while run < LONG and at - 1 - run >= 0 and self.out[at - 1 - run] == self.out[here - 1 - run]:
            run += 1
        return run

    def _move(self, first: int, second: int, byte: int) -> None:
        aligned, found = self.aligned, self.found
        if aligned.at >= 0:
            wrong = 0 if first == byte else 1
            aligned.history = (aligned.history << 1 | wrong) & 255
            if not wrong:
                aligned.run += 1
            else:
                aligned.run = 0 if aligned.run < 16 else aligned.run // 4
            aligned.at += 1
            if aligned.history == 255 and found.at >= 0 and second == byte:
                self.aligned = Place(found.at + 1, found.run)
        if found.at >= 0:
            self.found = Place(found.at + 1, found.run + 1) if second == byte else Place(-1, 0)

    def _word(self, place: int) -> int:
        return int.from_bytes(self.out[place : place + 4], "little") if place >= 0 else 0

    def _special(self, here: int, guess: int, _: int) -> tuple[int, int]:
        """The contexts of models 9 and 10: four-byte numbers that go on as before."""
        place, lane = self.aligned.at, (here - self.edge) & 3
        last, older = self._word(here - 4 - lane), self._word(here - 8 - lane)
        line = ((2 * last - older) >> (8 * lane)) & 255
        moved = ((self._word(place - lane) + last - self._word(place - lane - 4)) >> (8 * lane)) & 255
        four = self.out[here - 4] if here >= 4 else 0
        return moved << 3 | lane << 1 | (1 if moved == guess else 0), line << 10 | lane << 8 | four

    def _mixed(self, here: int, first: int, second: int, sure: int) -> int:
        out, place, run = self.out, self.aligned.at, self.found.run
        guess = max(first, 0)
        after = out[place + 1] if place >= 0 and place + 1 < here else 0
        before = out[place - 1] if place > 0 else 0
        one, two, three, four = (out[here - back] if here >= 4 else 0 for back in (1, 2, 3, 4))
        lane = (here - self.edge) & 3
        miss = 1 if sure >= 0 else 0
        state = min(self.aligned.run, 3) << 2 | min(run, 15) >> 2
        contexts = (
            lane | miss << 2,
            guess << 11 | one << 3 | miss << 2,
            guess << 6 | lane << 4 | state,
            one << 2 | lane,
            one << 8 | two,
            one << 16 | two << 8 | three,
            four << 10 | lane << 8 | one,
            guess << 16 | after << 8 | before,
            (second + 1) << 5 | min(run, 24),
            *self._special(here, guess, miss),
            (sure + 1) << 3 | lane,
        )
        if miss:
            return self.mixer.decode(contexts, 12 + lane, -1)
        strength = min(3, run // 4) if self.found.at >= 0 else 0
        return self.mixer.decode(contexts, 4 * strength + lane, second if self.found.at >= 0 else guess)
