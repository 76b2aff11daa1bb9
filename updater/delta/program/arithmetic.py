"""A binary arithmetic coder whose bit models learn as they go, for what is small: tables, parameters,
lengths.

Plain Python, some microseconds a bit; whatever has more than some thousand values belongs into rans.py. One
class codes in either direction: every call takes the value to write (ignored when reading) and gives the
value
back, so that writer and reader are the same statements and cannot drift apart.

The coder is the carry-free range coder of lpaq (M. Mahoney): an interval [low, high] of 32 bits, split at
low + (range * p >> 16) for p = P(1) * 2^16; equal top bytes are shifted out.
Models hold p in 16 bits and move by (target - p) / (n + 1.5), n their visits so far up to a limit: integers
only.
"""

from __future__ import annotations

from updater import limits
from updater.delta.program.operands import LimitError, ProgramError

_MASK = 0xFFFFFFFF
_START = 1 << 15
RATES = tuple((1 << 16) * 2 // (2 * n + 3) for n in range(256))  # 2^16 / (n + 1.5)
DEFAULT_LIMIT = 60  # visits after which a model's rate stays
MAX_INT_BITS = 64
_MODELLED_BITS = 3  # of an integer below its top bit


class CoderError(ProgramError):
    """A stream that no encoder writes."""


def decisions(length: int) -> int:
    """The binary decisions that a block of `length` bytes may take for its records, or for its skeleton."""
    return min(limits.MAX_CODED_DECISIONS, 32 * length + 4096)


class Coder:
    """Codes bits into bytes (`Coder()`) or out of them (`Coder(data)`).

    Contexts name models: any hashable value; a model begins at one half. A stream makes at most `budget`
    binary decisions, in either direction: each takes some microseconds, whatever it says.
    """

    def __init__(
        self,
        data: bytes | None = None,
        limit: int = DEFAULT_LIMIT,
        budget: int = limits.MAX_CODED_DECISIONS,
    ) -> None:
        self._left = self._budget = budget
        self.reading = data is not None
        self._data = data or b""
        self._at = 4
        self._low, self._high = 0, _MASK
        self._code = int.from_bytes(self._data[:4].ljust(4, b"\0"), "big")
        self._out = bytearray()
        self._models: dict[object, list[int]] = {}
        self._integers: dict[object, tuple[list[list[int]], dict[tuple[int, int], list[int]]]] = {}
        self._limit = limit

    def raw_bit(self, bit: int, probability: int) -> int:
        """One bit whose P(1) is probability / 2^16, 1 to 65535."""
        self._left -= 1
        if self._left < 0:
            raise LimitError("decisions of one stream", self._budget + 1, self._budget)
        low, high = self._low, self._high
        middle = low + ((high - low) * probability >> 16)
        if self.reading:
            bit = int(self._code <= middle)
        if bit:
            high = middle
        else:
            low = middle + 1
        while not (low ^ high) & 0xFF000000:
            if self.reading:
                following = self._data[self._at] if self._at < len(self._data) else 0
                self._code = (self._code << 8 & _MASK) | following
                self._at += 1
                if self._at > len(self._data) + 4:
                    raise CoderError("a stream ends before its values")
            else:
                self._out.append(high >> 24)
            low = low << 8 & _MASK
            high = (high << 8 & _MASK) | 0xFF
        self._low, self._high = low, high
        return bit

    def bit(self, context: object, bit: int = 0) -> int:
        """One bit with the model of a context."""
        model = self._models.get(context)
        if model is None:
            model = self._models[context] = [_START, 0]
        return self._modelled(model, bit)

    def _modelled(self, model: list[int], bit: int) -> int:
        probability, visits = model
        bit = self.raw_bit(bit, probability)
        probability += ((65535 if bit else 0) - probability) * RATES[visits] >> 16
        model[0] = 32 if probability < 32 else 65503 if probability > 65503 else probability
        if visits < self._limit:
            model[1] = visits + 1
        return bit

    def bits(self, value: int, count: int) -> int:
        """`count` equally likely bits, the highest first."""
        out = 0
        for shift in range(count - 1, -1, -1):
            out = out << 1 | self.raw_bit(value >> shift & 1, 1 << 15)
        return out

    def unsigned(self, context: object, value: int = 0) -> int:  # noqa: C901 - one loop, spelled out for speed
        """An integer of up to 64 bits: its size in unary, then the bits below the top one (Elias,
        modelled).
        """
        found = self._integers.get(context)
        if found is None:  # looked up once: names of models are costly to put together
            found = self._integers[context] = ([], {})
        sizes, tops = found
        given = value + 1
        size = given.bit_length() - 1
        # `_modelled` and `raw_bit` spelled out, their state in local names: most decisions are made here.
        reading, data, code, at = self.reading, self._data, self._code, self._at
        low, high, left, most = self._low, self._high, self._left, self._limit
        length, out, below = 0, 0, 0  # out is 0 while the size is coded; below: bits still to come
        while not out or below:
            if not out:
                if length == len(sizes):
                    sizes.append([_START, 0])
                model: list[int] | None = sizes[length]
                bit = length < size
            else:
                below -= 1
                bit = bool(given >> below & 1)
                model = None
                if length - below <= _MODELLED_BITS:
                    model = tops.get((length, out))
                    if model is None:
                        model = tops[length, out] = [_START, 0]
            left -= 1
            if left < 0:
                raise LimitError("decisions of one stream", self._budget + 1, self._budget)
            probability = model[0] if model is not None else _START
            middle = low + ((high - low) * probability >> 16)
            if reading:
                bit = code <= middle
            if bit:
                high = middle
            else:
                low = middle + 1
            while not (low ^ high) & 0xFF000000:
                if reading:
                    code = (code << 8 & _MASK) | (data[at] if at < len(data) else 0)
                    at += 1
                    if at > len(data) + 4:
                        raise CoderError("a stream ends before its values")
                else:
                    self._out.append(high >> 24)
                low = low << 8 & _MASK
                high = (high << 8 & _MASK) | 0xFF
            if model is not None:
                visits = model[1]
                probability += ((65535 if bit else 0) - probability) * RATES[visits] >> 16
                model[0] = 32 if probability < 32 else 65503 if probability > 65503 else probability
                if visits < most:
                    model[1] = visits + 1
            if out:
                out = out << 1 | bit
            elif bit:
                length += 1
                if length > MAX_INT_BITS:
                    raise CoderError("an integer has more than 64 bits")
            else:
                out, below = 1, length
        self._low, self._high, self._code, self._at, self._left = low, high, code, at, left
        return out - 1

    def signed(self, context: object, value: int = 0) -> int:
        """A signed integer: folded (0, -1, 1, -2, ...), then as `unsigned`."""
        folded = self.unsigned(context, value << 1 if value >= 0 else (-value << 1) - 1)
        return folded >> 1 if not folded & 1 else -(folded + 1 >> 1)

    def finish(self) -> bytes:
        """The bytes written: the shortest that lead the decoder, which reads zeros behind them, into the
        interval.
        """
        return bytes(self._out) + self._tail()

    def end(self) -> None:
        """Refuses what is left after the last decision that was read. Raises CoderError."""
        if self._data[self._at - 4 :] != self._tail():
            raise CoderError("a stream does not end where its values do")

    def _tail(self) -> bytes:
        """The fewest bytes whose number, zeros behind it, lies in [low, high]."""
        for count in range(5):
            keep = 32 - 8 * count
            code = (self._low + (1 << keep) - 1) >> keep
            if code << keep <= self._high:
                return code.to_bytes(count, "big") if count else b""
        raise AssertionError("an interval of the coder is empty")
