"""The delta tools that sluice is measured against, each behind the same three calls.

A peer encodes old→new into a patch, decodes it again, and says why it cannot run here. Every round trip is
compared byte by byte: a patch that does not rebuild its target has no size. Seconds of a program are with its
start, except where it says itself how long the work took (ZipNN, whose start is PyTorch's).
"""

from __future__ import annotations

import filecmp
import importlib.util
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from updater.errors import SluiceError
from updater.formats import read_model
from updater.formats.span import TensorSpan

ROOT = Path(__file__).resolve().parents[1]
TORCH_PYTHON = ROOT / ".cache" / "minilm-venv" / "bin" / "python"

TIMEOUT_S = 3600  # of one run of one tool
SLOW_BYTES = 30 << 20  # a slow tool leaves out pairs with a larger file, unless all are asked for
# A short decode is measured again and the fastest counts: on a shared machine the first is often an outlier.
DECODE_RUNS = 3
DECODE_AGAIN_BELOW_S = 3.0


@dataclass(frozen=True)
class Measurement:
    """One tool on one pair.

    Attributes:
        patch_bytes: the patch.
        encode_s, decode_s: seconds; of several decodes the fastest.
        decode_anon_bytes: the most anonymous memory while decoding, where it was watched.
        pool_bytes: of the patch, those that hold entropy coded residuals with their tables.
        entropy_bytes: what these residuals need at the entropy of their symbols in the coder's contexts.
    """

    patch_bytes: int
    encode_s: float
    decode_s: float
    decode_anon_bytes: int | None = None
    pool_bytes: int | None = None
    entropy_bytes: float | None = None


class Peer(ABC):
    """A delta tool. `name` is its column's heading; `slow` ones take minutes on large files."""

    name: str
    slow = False

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot run here, with what installs it; empty when it can."""

    @abstractmethod
    def encode(self, old: Path, new: Path, patch: Path) -> float | None:
        """Writes the patch; the seconds it took, if the tool knows better than a clock around it."""

    @abstractmethod
    def decode(self, old: Path, patch: Path, out: Path) -> float | None:
        """Rebuilds the target; seconds likewise."""

    def version(self) -> str:
        """For the report; empty when it has none."""
        return ""

    def measure(self, old: Path, new: Path, scratch: Path) -> Measurement:
        """Encodes, decodes and compares; raises RuntimeError when the result differs from `new`."""
        patch, out = scratch / f"{self.name}.patch", scratch / f"{self.name}.out"
        for leftover in (patch, out):
            leftover.unlink(missing_ok=True)
        encode_s = _timed(lambda: self.encode(old, new, patch))
        decode_s = _timed(lambda: self.decode(old, patch, out))
        if not filecmp.cmp(out, new, shallow=False):
            raise RuntimeError(f"{self.name} rebuilt {new.name} wrongly")
        for _ in range(DECODE_RUNS - 1):
            if decode_s >= DECODE_AGAIN_BELOW_S:
                break
            out.unlink()
            decode_s = min(decode_s, _timed(lambda: self.decode(old, patch, out)))
        size = patch.stat().st_size
        patch.unlink()
        out.unlink()
        return Measurement(size, encode_s, decode_s)


def _timed(work: Callable[[], float | None]) -> float:
    start = time.perf_counter()
    own = work()
    return time.perf_counter() - start if own is None else own


def run_tool(command: list[str]) -> str:
    """Runs a program to its end; its standard output. Raises RuntimeError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {last[:200]}")
    return done.stdout


class Program(Peer):
    """A peer that is a program: argument lists with {old}, {new}, {patch} and {out}."""

    def __init__(self, name: str, package: str, encode: str, decode: str, *, slow: bool = True) -> None:
        self.name = name
        self.slow = slow
        self._package = package
        self._encode = encode.split()
        self._decode = decode.split()

    def missing(self) -> str:
        absent = [word for word in {self._encode[0], self._decode[0]} if shutil.which(word) is None]
        return f"{', '.join(absent)} not found: apt-get install {self._package}" if absent else ""

    def version(self) -> str:
        query = ["dpkg-query", "-W", "-f", "${Version}", self._package]
        if shutil.which(query[0]) is None:
            return ""
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout.strip()

    def encode(self, old: Path, new: Path, patch: Path) -> None:
        self._run(self._encode, old=old, new=new, patch=patch)

    def decode(self, old: Path, patch: Path, out: Path) -> None:
        self._run(self._decode, old=old, patch=patch, out=out)

    def _run(self, words: list[str], **paths: Path) -> None:
        run_tool([word.format(**paths) for word in words])


class HDiffPatch(Peer):
    """HDiffPatch through its PyPI binding, with LZMA over its diff as its own tool has it."""

    name = "HDiffPatch"
    slow = True

    def version(self) -> str:
        return metadata.version("hdiffpatch")

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


class ZipNN(Peer):
    """ZipNN's delta mode, run by the interpreter that has PyTorch. Seconds are without PyTorch's start."""

    name = "ZipNN"

    def missing(self) -> str:
        if not TORCH_PYTHON.is_file():
            return "ZipNN needs PyTorch, in a venv of its own: make minilm-venv"
        return ""

    def version(self) -> str:
        query = "import importlib.metadata as m; print(m.version('zipnn'))"
        return run_tool([str(TORCH_PYTHON), "-c", query]).strip()

    def encode(self, old: Path, new: Path, patch: Path) -> float:
        return self._run("encode", old, new, patch)

    def decode(self, old: Path, patch: Path, out: Path) -> float:
        return self._run("decode", old, patch, out)

    def _run(self, action: str, old: Path, given: Path, out: Path) -> float:
        tool = Path(__file__).with_name("zipnn_tool.py")
        command = [str(TORCH_PYTHON), str(tool), action, zipnn_dtype(old), str(old), str(given), str(out)]
        return float(run_tool(command))


def zipnn_dtype(path: Path) -> str:
    """The element type that most bytes of a file have, of those that ZipNN knows; else its float32."""
    lengths: Counter[str] = Counter()
    for span in spans(path):
        lengths[span.dtype] += span.length
    most = lengths.most_common(1)[0][0] if lengths else ""
    return most if most in ("float16", "bfloat16") else "float32"


def spans(path: Path) -> Sequence[TensorSpan]:
    """The tensors of a file; none when no reader knows it."""
    try:
        return read_model(path).spans
    except SluiceError:
        return ()


PEERS: tuple[Peer, ...] = (
    Program("bsdiff", "bsdiff", "bsdiff {old} {new} {patch}", "bspatch {old} {out} {patch}"),
    HDiffPatch(),
    Program(
        "xdelta3",
        "xdelta3",
        "xdelta3 -9 -S djw -f -e -B 536870912 -s {old} {new} {patch}",
        "xdelta3 -f -d -B 536870912 -s {old} {patch} {out}",
        slow=False,
    ),
    Program(
        "zstd -19",
        "zstd",
        "zstd -q -f -19 --ultra --long=31 --patch-from={old} {new} -o {patch}",
        "zstd -q -f -d --long=31 --memory=2048MB --patch-from={old} {patch} -o {out}",
    ),
    ZipNN(),
)
