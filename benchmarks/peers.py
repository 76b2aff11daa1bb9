"""The delta tools that sluice is measured against, each behind the same three calls.

A peer encodes old→new into a patch, decodes it again, and says why it cannot run here. Every round trip is
compared byte by byte: a patch that does not rebuild its target has no size.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 3600  # of one run of one tool


@dataclass(frozen=True)
class Measurement:
    """One tool on one pair: patch size in bytes, seconds with process start where it is a program."""

    patch_bytes: int
    encode_s: float
    decode_s: float


class Peer(ABC):
    """A delta tool. `name` is its column's heading."""

    name: str

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot run here, with what installs it; empty when it can."""

    @abstractmethod
    def encode(self, old: Path, new: Path, patch: Path) -> None: ...

    @abstractmethod
    def decode(self, old: Path, patch: Path, out: Path) -> None: ...

    def measure(self, old: Path, new: Path, scratch: Path) -> Measurement:
        """Encodes, decodes and compares; raises RuntimeError when the result differs from `new`."""
        patch, out = scratch / f"{self.name}.patch", scratch / f"{self.name}.out"
        for leftover in (patch, out):
            leftover.unlink(missing_ok=True)
        start = time.perf_counter()
        self.encode(old, new, patch)
        encoded = time.perf_counter()
        self.decode(old, patch, out)
        decoded = time.perf_counter()
        if out.read_bytes() != new.read_bytes():
            raise RuntimeError(f"{self.name} rebuilt {new} wrongly")
        return Measurement(patch.stat().st_size, encoded - start, decoded - encoded)


class Program(Peer):
    """A peer that is a program: argument lists with {old}, {new}, {patch} and {out}."""

    def __init__(self, name: str, package: str, encode: str, decode: str) -> None:
        self.name = name
        self._package = package
        self._encode = encode.split()
        self._decode = decode.split()

    def missing(self) -> str:
        absent = [word for word in {self._encode[0], self._decode[0]} if shutil.which(word) is None]
        return f"{', '.join(absent)} not found: apt-get install {self._package}" if absent else ""

    def encode(self, old: Path, new: Path, patch: Path) -> None:
        self._run(self._encode, old=old, new=new, patch=patch)

    def decode(self, old: Path, patch: Path, out: Path) -> None:
        self._run(self._decode, old=old, patch=patch, out=out)

    def _run(self, words: list[str], **paths: Path) -> None:
        command = [word.format(**paths) for word in words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")


class HDiffPatch(Peer):
    """HDiffPatch through its PyPI binding, with LZMA over its diff as its own tool has it."""

    name = "HDiffPatch"

    def missing(self) -> str:
        if importlib.util.find_spec("hdiffpatch") is None:
            return "hdiffpatch not found: pip install '.[bench]'"
        return ""

    def encode(self, old: Path, new: Path, patch: Path) -> None:
        import hdiffpatch

        config = hdiffpatch.COMPRESSION_LZMA
        patch.write_bytes(
            hdiffpatch.diff(old.read_bytes(), new.read_bytes(), compression=config, validate=False)
        )

    def decode(self, old: Path, patch: Path, out: Path) -> None:
        import hdiffpatch

        out.write_bytes(hdiffpatch.apply(old.read_bytes(), patch.read_bytes()))


PEERS: tuple[Peer, ...] = (
    Program("bsdiff", "bsdiff", "bsdiff {old} {new} {patch}", "bspatch {old} {out} {patch}"),
    HDiffPatch(),
    Program(
        "xdelta3",
        "xdelta3",
        "xdelta3 -9 -S djw -f -e -B 536870912 -s {old} {new} {patch}",
        "xdelta3 -f -d -B 536870912 -s {old} {patch} {out}",
    ),
    Program(
        "zstd -19",
        "zstd",
        "zstd -q -f -19 --ultra --long=31 --patch-from={old} {new} -o {patch}",
        "zstd -q -f -d --long=31 --memory=2048MB --patch-from={old} {patch} -o {out}",
    ),
)
