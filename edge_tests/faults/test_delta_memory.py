"""Applying needs memory for one block, however large the target is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np

from updater import limits
from updater.delta import container, instructions, streams
from updater.delta.elements import ELEMENT_TYPES
from updater.delta.instructions import Tensor
from updater.digests import PREFIX, digest_file

BLOCK = limits.DEFAULT_BLOCK_BYTES
MIB = 1 << 20
CHILD = """
import sys
from pathlib import Path
from updater import delta
delta.apply(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""


def make_delta(directory: Path, blocks: int) -> Path:
    """A delta whose blocks each write the same 4 MiB: floats of the base, every one a little changed."""
    random = np.random.default_rng(4)
    base = random.normal(0, 0.1, BLOCK // 4).astype(np.float32)
    (directory / "base").write_bytes(base.tobytes())
    residual = random.integers(0, 1 << 18, BLOCK // 4, dtype=np.uint32)
    table = residual.view(np.uint8).reshape(-1, 4)
    planes = [streams.compress(table[:, index].tobytes(), 3) for index in range(4)]
    keys = base.view(np.uint32)
    difference = residual >> 1 ^ -(residual & 1).astype(np.uint32)
    ordered = np.where(keys >> 31, ~keys, keys | 1 << 31) + difference
    block = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered).astype(np.uint32).tobytes()
    sha = hashlib.sha256()
    for _ in range(blocks):
        sha.update(block)
    header = container.Header(
        digest_file(directory / "base"),
        BLOCK,
        PREFIX + sha.hexdigest(),
        blocks * BLOCK,
        BLOCK,
        blocks,
        ("tensor",),
    )
    path = directory / f"delta{blocks}"
    start = container.encode_header(header)
    with path.open("wb") as file:
        file.write(start)
        for number in range(blocks):
            item = Tensor(
                instructions.DIFFERENCE, instructions.DENSE, ELEMENT_TYPES[8], BLOCK // 4, 0, 0, (1, 2, 3, 4)
            )
            listing = instructions.encode([item], number * BLOCK)
            payload = streams.encode_table(
                [streams.Stream(0, len(listing), listing), *planes], number * BLOCK
            )
            file.write(container.encode_block(container.header_checksum(start), number, BLOCK, payload))
        file.write(bytes([container.MARK_END]))
    return path


def peak(directory: Path, delta: Path) -> int:
    """The most bytes that a process applying `delta` ever had resident."""
    out = directory / "out"
    arguments = [sys.executable, "-c", CHILD, str(directory / "base"), str(delta), str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=100)
    out.unlink()
    return int(done.stdout)


def test_memory_does_not_grow_with_the_target(tmp_path: Path) -> None:
    # Enough blocks in both that two are decoded at once at the worst moment.
    small = peak(tmp_path, make_delta(tmp_path, 25))
    large = peak(tmp_path, make_delta(tmp_path, 75))
    assert large < small + 2 * BLOCK
    # The interpreter with NumPy and gRPC, and for each of two blocks payload, streams, prediction, output.
    assert large < 160 * MIB
