"""Encoders that fail in ways real ones could, for the control plane's `--encoder` setting.

They run in the builder's own process, in place of `updater.delta.create`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from updater import delta
from updater.delta import DeltaSummary


def wrong_target(base: Path | None, target: Path, out: Path) -> DeltaSummary:
    """A well-formed delta to other bytes, with a summary that claims the right ones."""
    if base is None:
        return delta.create(None, target, out)
    other = out.with_name(out.name + "-other")
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    try:
        summary = delta.create(base, other, out)
    finally:
        other.unlink()
    honest = delta.create(base, target, out.with_name(out.name + "-honest"))
    out.with_name(out.name + "-honest").unlink()
    return replace(summary, target_digest=honest.target_digest)


def torn(base: Path | None, target: Path, out: Path) -> DeltaSummary:
    """A delta that lost its end."""
    summary = delta.create(base, target, out)
    if base is not None:
        os.truncate(out, out.stat().st_size - 10)
    return summary


def crash(base: Path | None, target: Path, out: Path) -> DeltaSummary:
    """Dies like a segmentation fault, on deltas with a base."""
    if base is not None:
        os.kill(os.getpid(), signal.SIGSEGV)
    return delta.create(base, target, out)


def slow(base: Path | None, target: Path, out: Path) -> DeltaSummary:
    """Waits on deltas with a base until the file named by SLUICE_TEST_GATE is there, at most a minute."""
    deadline = time.monotonic() + 60
    while base is not None and not Path(os.environ["SLUICE_TEST_GATE"]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return delta.create(base, target, out)
