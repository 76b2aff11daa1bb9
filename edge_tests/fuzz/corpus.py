"""The inputs that are kept: one a line, in hex, sorted by length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

FILE = Path(__file__).with_name("corpus") / "inputs.txt"
MOST_BYTES = 300 << 10  # of the file
INPUT_BYTES = 256  # of one input

TraceFunction = Callable[[FrameType, str, Any], Any]
Step = TypeVar("Step")


def load() -> list[bytes]:
    """All inputs."""
    return [bytes.fromhex(line) for line in FILE.read_text().split("\n")[:-1]]


def reached(call: Callable[[], object], below: str) -> frozenset[tuple[str, int, int]]:
    """The steps from line to line that a call takes in files whose path contains `below`."""
    steps: set[tuple[str, int, int]] = set()

    def enter(frame: FrameType, _event: str, _value: object) -> TraceFunction | None:
        name = frame.f_code.co_filename
        if below not in name:
            return None
        last = 0

        def step(inner: FrameType, event: str, _value: object) -> TraceFunction:
            nonlocal last
            if event == "line":
                steps.add((name, last, inner.f_lineno))
                last = inner.f_lineno
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    return frozenset(steps)


def smallest(inputs: Iterable[bytes], reach: Callable[[bytes], frozenset[Step]]) -> list[bytes]:
    """Of the inputs, the shortest first, those that reach something that none before did."""
    known: set[Step] = set()
    kept = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        found = reach(data)
        if found - known:
            known |= found
            kept.append(data)
    return kept


def store(inputs: Iterable[bytes]) -> int:
    """Writes as many inputs as there is room for, the shortest first; gives their number."""
    lines, size = [], 0
    for found in sorted(set(inputs), key=lambda data: (len(data), data)):
        size += 2 * len(found) + 1
        if size > MOST_BYTES:
            break
        lines.append(found.hex() + "\n")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("".join(lines))
    return len(lines)
