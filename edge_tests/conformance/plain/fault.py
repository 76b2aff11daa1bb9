"""What a decoder says of a delta that it refuses."""

from __future__ import annotations

INVALID = "DELTA_INVALID"
TRUNCATED = "DELTA_TRUNCATED"
CORRUPT = "DELTA_CORRUPT"
WRONG_BASE = "DELTA_WRONG_BASE"
MISMATCH = "DELTA_TARGET_MISMATCH"
UNSUPPORTED = "DELTA_UNSUPPORTED"
OVER_LIMIT = "DELTA_LIMIT_EXCEEDED"


class Fault(Exception):
    """A delta that is refused; `code` is one of the document's error codes."""

    def __init__(self, message: str, code: str = INVALID) -> None:
        super().__init__(message)
        self.code = code


def check(holds: bool, message: str, code: str = INVALID) -> None:
    """Refuses unless a condition holds."""
    if not holds:
        raise Fault(message, code)
