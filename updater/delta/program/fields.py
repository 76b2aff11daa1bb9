"""The numbers of records as they are sent: most repeat what was last said in the same context."""

from __future__ import annotations

from updater import limits
from updater.delta.program.arithmetic import Coder
from updater.delta.program.operands import within


class Fields:
    """Codes integers that often repeat what was last said in the same context."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self._last: dict[object, int] = {}

    def number(self, context: tuple[object, ...], value: int = 0, near: int | None = None) -> int:
        """A signed integer: as the last one in this context, or its difference to `near` (or to that one)."""
        last = self._last.get(context, 0)
        if self.coder.bit(("again", *context), int(value == last)):
            return last
        reference = last if near is None else near
        value = reference + self.coder.signed(("number", context[0]), value - reference)
        within("as a number of a record", abs(value), limits.MAX_RECORD_NUMBER)
        self._last[context] = value
        return value
