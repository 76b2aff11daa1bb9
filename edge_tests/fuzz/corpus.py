"""The inputs that are kept: one a line, in hex, sorted by length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).with_name("corpus") / "inputs.txt"
MOST_BYTES = 300 << 10  # of the file
INPUT_BYTES = 256  # of one input


def load() -> list[bytes]:
    """All inputs."""
    return [bytes.fromhex(line) for line in FILE.read_text().split("\n")[:-1]]


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
