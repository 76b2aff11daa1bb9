"""Memory of applying: a model of 1 GB under a control group of 256 MB. `make bench-memory`; needs root.

Makes a float32 model of 1 GB and a fine-tuned copy, encodes the delta, drops both files from the page cache,
and applies it in a process that the kernel holds to 256 MB, mapped files and page cache included. First it
shows that the limit bites: a process that takes more must be killed. Prints the peak of anonymous memory, the
group's peak and the seconds; ends with 1 when the result is wrong or anonymous memory reaches 128 MB.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import cgroup, report
from benchmarks.cgroup import MemoryLimit
from benchmarks.decoding import decode
from benchmarks.report import Table
from benchmarks.targets import DECODE_ANON_BYTES
from updater import delta

LIMIT_BYTES = 256_000_000
MODEL_BYTES = 1_000_000_000
TENSOR_ELEMENTS = 4_000_000
MOVE = 1e-5  # standard deviation of the fine-tuning; that of the weights is 0.02
CONTROL_S = 60.0
HOG = "import sys; held = bytearray(int(sys.argv[1])); print(len(held))"


def write_models(old: Path, new: Path, size: int) -> None:
    """A safetensors model of random weights, and one with every weight moved a little."""
    count = -(-size // (4 * TENSOR_ELEMENTS))
    header = {
        f"layer{index}.weight": {
            "dtype": "F32",
            "shape": [TENSOR_ELEMENTS // 1000, 1000],
            "data_offsets": [4 * TENSOR_ELEMENTS * index, 4 * TENSOR_ELEMENTS * (index + 1)],
        }
        for index in range(count)
    }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    random = np.random.default_rng(5)
    with old.open("wb") as before, new.open("wb") as after:
        for file in (before, after):
            file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            weights = random.standard_normal(TENSOR_ELEMENTS, np.float32) * np.float32(0.02)
            before.write(weights.tobytes())
            weights += random.standard_normal(TENSOR_ELEMENTS, np.float32) * np.float32(MOVE)
            after.write(weights.tobytes())


def drop_from_cache(path: Path) -> None:
    """So that its pages count for whoever reads it next."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limit_bites() -> bool:
    """Whether a process that takes more than the limit is killed."""
    with MemoryLimit(LIMIT_BYTES) as limit:
        done = subprocess.run(
            [sys.executable, "-c", HOG, str(LIMIT_BYTES * 2)],
            capture_output=True,
            timeout=CONTROL_S,
            check=False,
            preexec_fn=limit.enter,
        )
    return done.returncode == -signal.SIGKILL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=MODEL_BYTES, help="of the model")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    arguments = parser.parse_args()
    if why := cgroup.missing():
        print(f"SKIPPED, nothing was measured: {why}")
        return 0
    if not limit_bites():
        print("SKIPPED, nothing was measured: a process could take twice the limit and live")
        return 0
    with tempfile.TemporaryDirectory(prefix="sluice-memory-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        old, new, patch, out = (folder / part for part in ("old.safetensors", "new", "delta", "out"))
        write_models(old, new, arguments.bytes)
        start = time.perf_counter()
        delta.create(old, new, patch)
        encode_s = time.perf_counter() - start
        for path in (old, new, patch):
            drop_from_cache(path)
        with MemoryLimit(LIMIT_BYTES) as limit:
            decoded = decode(old, patch, out, enter=limit.enter)
            peak = limit.peak_bytes()
        right = filecmp.cmp(out, new, shallow=False)
        row = [
            f"{new.stat().st_size:,}",
            f"{patch.stat().st_size:,}",
            f"{encode_s:.1f}",
            f"{decoded.seconds:.1f}",
            f"{decoded.anon_bytes / 1e6:.0f}",
            f"{peak / 1e6:.0f}" if peak is not None else "-",
        ]
    within = decoded.anon_bytes < DECODE_ANON_BYTES
    verdict = "yes" if right and within else "NO"
    headings = ["target, B", "delta, B", "encode, s", "apply, s", "RssAnon, MB", "group's peak, MB"]
    table = Table(
        f"Applying under {LIMIT_BYTES / 1e6:.0f} MB",
        [*headings, f"under {DECODE_ANON_BYTES / 1e6:.0f} MB, bit-exact"],
        [[*row, verdict]],
        text=(),
    )
    print(table.markdown())
    print(f"on {report.machine()}; the control group killed a process that took twice the limit")
    if arguments.write:
        note = (
            "Every weight of a float32 model moved a little. The limit holds page cache and mapped files "
            "too. RssAnon is what the process itself cannot give back. A process that took twice the limit "
            "was killed before. Applying ran on one core, from files that were not in the page cache."
        )
        report.write_section("memory", report.section("Memory", "make bench-memory", [note], [table]))
    return 0 if right and within else 1


if __name__ == "__main__":
    sys.exit(main())
