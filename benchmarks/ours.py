"""sluice as one of the tools: encoded in this process on all cores, decoded in one of its own on one core."""

from __future__ import annotations

import filecmp
import time
from pathlib import Path

from benchmarks.decoding import decode
from benchmarks.peers import DECODE_AGAIN_BELOW_S, DECODE_RUNS, Measurement, Peer
from updater import delta


class Sluice(Peer):
    """sluice at one effort. No start of a program is counted, neither way."""

    def __init__(self, effort: str) -> None:
        self.name = f"sluice {effort}"
        self._effort = effort

    def missing(self) -> str:
        return ""

    def encode(self, old: Path, new: Path, patch: Path) -> None:
        self._encode(old, new, patch)

    def decode(self, old: Path, patch: Path, out: Path) -> float:
        return decode(old, patch, out).seconds

    def measure(self, old: Path, new: Path, scratch: Path) -> Measurement:
        """As for every peer, and the memory of the decoder and the entropy of its symbols."""
        patch, out = scratch / "sluice.patch", scratch / "sluice.out"
        start = time.perf_counter()
        summary = self._encode(old, new, patch)
        encode_s = time.perf_counter() - start
        runs = []
        for _ in range(DECODE_RUNS):
            out.unlink(missing_ok=True)
            runs.append(decode(old, patch, out))
            if runs[-1].seconds >= DECODE_AGAIN_BELOW_S:
                break
        if not filecmp.cmp(out, new, shallow=False):
            raise RuntimeError(f"{self.name} rebuilt {new} wrongly")
        size = patch.stat().st_size
        patch.unlink()
        out.unlink()
        return Measurement(
            patch_bytes=size,
            encode_s=encode_s,
            decode_s=min(run.seconds for run in runs),
            decode_anon_bytes=max(run.anon_bytes for run in runs),
            pool_bytes=summary.pool_bytes,
            entropy_bytes=summary.entropy_bytes,
        )

    def _encode(self, old: Path, new: Path, patch: Path) -> delta.DeltaSummary:
        return delta.create(old, new, patch, options=delta.EncodeOptions(effort=self._effort))
