"""One `delta.apply` in a process of its own: its seconds on one core, and its peak of anonymous memory.

`python -m benchmarks.decoding BASE DELTA OUT` applies and prints {"seconds": s}; `decode` starts that and
reads RssAnon from /proc until it ends. Anonymous memory is what the process needs; mapped files are the
kernel's to drop. The clock runs from after the imports to the target in its place, fsyncs included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from updater import delta

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.002
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Decoded:
    """Seconds without process start, and the most anonymous memory seen, bytes."""

    seconds: float
    anon_bytes: int


def anonymous_bytes(pid: int) -> int:
    """A process's RssAnon now; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def decode(base: Path, patch: Path, out: Path, *, enter: Callable[[], None] | None = None) -> Decoded:
    """Applies a delta, as `updater.delta.apply`, on one core of this process's, and watches.

    `enter` is called in the new process before it starts, to put it under a limit. Raises RuntimeError when
    it fails.
    """
    core = min(os.sched_getaffinity(0))

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        if enter is not None:
            enter()

    command = [sys.executable, "-m", "benchmarks.decoding", str(base), str(patch), str(out)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    ) as process:
        peak, deadline = 0, time.monotonic() + TIMEOUT_S
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(SAMPLE_S)
        output, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"applying {patch} ended with {process.returncode}: {errors.strip()[-2000:]}")
    return Decoded(float(json.loads(output)["seconds"]), peak)


def main() -> None:
    base, patch, out = (Path(argument).resolve() for argument in sys.argv[1:])
    start = time.perf_counter()
    delta.apply(base, patch, out)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
