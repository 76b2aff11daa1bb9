"""Arithmetic coded streams out of choices: they follow the grammar of whoever codes them.

`DrawingCoder` is handed to the encoder's own statements in the place of a coder and writes what the choices
say instead of what it is told; with a source it repeats a stream, and changes a value here and there.
"""

from __future__ import annotations

from edge_tests.fuzz.choices import Choices
from updater.delta.program.arithmetic import Coder, CoderError

DECISIONS = 1 << 15  # that an invented stream makes at most


class DrawingCoder(Coder):
    """Writes drawn values and gives them back.

    Args:
        choices: the decisions.
        limit: visits after which a model keeps its rate, as the reader has it.
        source: a stream to follow.
    """

    def __init__(self, choices: Choices, limit: int, source: bytes | None = None) -> None:
        super().__init__(limit=limit, budget=DECISIONS)
        self._choices = choices
        self._source = Coder(source, limit) if source is not None else None
        self._inside = False  # an integer, whose bits come from its value

    def _follow(self, kind: str, context: object) -> int | None:
        """The source's next value, unless it is to be changed or the source has ended."""
        if self._source is None:
            return None
        try:
            value = getattr(self._source, kind)(context)
        except CoderError:
            self._source = None
            return None
        return None if self._choices.left and self._choices.rarely() else int(value)

    def bit(self, context: object, bit: int = 0) -> int:
        if self._inside:
            return super().bit(context, bit)
        found = self._follow("bit", context)
        return super().bit(context, self._choices.below(2) if found is None else found)

    def bits(self, value: int, count: int) -> int:
        if self._source is not None:
            try:
                value = self._source.bits(0, count)
            except CoderError:
                self._source = None
        if self._source is None or self._choices.rarely():
            value = self._choices.number() & (1 << count) - 1
        return super().bits(value, count)

    def unsigned(self, context: object, value: int = 0) -> int:
        if self._inside:  # a folded signed number
            return self._integer(context, value)
        found = self._follow("unsigned", context)
        return self._integer(context, self._choices.number() if found is None else found)

    def signed(self, context: object, value: int = 0) -> int:
        found = self._follow("signed", context)
        value = self._choices.signed() if found is None else found
        self._integer(context, 2 * value if value >= 0 else -2 * value - 1)
        return value

    def _integer(self, context: object, value: int) -> int:
        self._inside = True
        try:
            return super().unsigned(context, value)
        finally:
            self._inside = False
