"""Holds any decoder of sluice's deltas to the test vectors; the decoder is an executable.

    python -m edge_tests.conformance.delta --decoder CMD [--vectors DIR] [--only NAME] [--json]

CMD is run as `CMD BASE_OR_DASH DELTA OUT`; docs/delta-format/vectors/README.md has the contract. Order: each
vector in a new directory, under a deadline and a memory limit; then what is there is compared. Rules: a
decoder that is killed, leaves something behind after an error or touches what it was given has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_tests.conformance import index
from edge_tests.conformance.index import VECTORS, Vector

ANNOUNCED_DIGEST = "ANNOUNCED_SHA256"
ANNOUNCED_SIZE = "ANNOUNCED_SIZE"

DEADLINE_S = 20.0  # of one vector
MEMORY_MIB = 512  # resident, of one decoder
ADDRESS_SPACE = 16  # times that: what a runtime may reserve without touching it
_POLL_S = 0.005
_STDERR_BYTES = 1 << 16  # that are looked at

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"


@dataclass(frozen=True)
class Result:
    """What a decoder made of one vector."""

    name: str
    outcome: str
    why: str
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Run:
    """One run of the decoder: its exit status, None where it was killed, and why."""

    status: int | None
    killed: str
    stderr: str
    seconds: float
    peak_mib: float


def run(command: Sequence[str], environment: dict[str, str], deadline: float, memory: int) -> Run:
    """Runs a decoder until it ends, the deadline (s) passes, or it holds more than `memory` MiB."""

    def limit() -> None:
        most = memory * ADDRESS_SPACE << 20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    start, peak, killed = time.monotonic(), 0.0, ""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            while process.poll() is None and not killed:
                peak = max(peak, _peak_mib(process.pid))
                if peak > memory:
                    killed = f"held {peak:.0f} MiB; {memory} are allowed"
                elif time.monotonic() - start > deadline:
                    killed = f"ran longer than {deadline:g} s"
                time.sleep(_POLL_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - start
        stderr.seek(0)
        said = stderr.read(_STDERR_BYTES).decode(errors="replace")
    return Run(None if killed else process.returncode, killed, said, seconds, peak)


def _peak_mib(pid: int) -> float:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def check(command: Sequence[str], vector: Vector, vectors: Path, deadline: float, memory: int) -> Result:
    """Runs one vector and judges what the decoder did."""
    with tempfile.TemporaryDirectory(prefix="delta-vector-") as folder:
        directory = Path(folder)
        shutil.copyfile(vectors / vector.delta, directory / "delta")
        given = {"delta": (directory / "delta").read_bytes()}
        if vector.base is not None:
            shutil.copyfile(vectors / vector.base, directory / "base")
            given["base"] = (directory / "base").read_bytes()
        environment = {}
        if vector.announced is not None:
            environment = {ANNOUNCED_DIGEST: vector.announced[0], ANNOUNCED_SIZE: str(vector.announced[1])}
        base = str(directory / "base") if vector.base is not None else "-"
        files = [base, str(directory / "delta"), str(directory / "out")]
        done = run([*command, *files], environment, deadline, memory)
        outcome, why = _judge(vector, done, directory, given)
        return Result(vector.name, outcome, why, round(done.seconds, 3), round(done.peak_mib, 1))


def _judge(vector: Vector, done: Run, directory: Path, given: dict[str, bytes]) -> tuple[str, str]:
    if done.killed:
        return FAILED, done.killed
    found = {path.name: path for path in directory.iterdir()}
    for name, content in given.items():
        if name not in found or found.pop(name).read_bytes() != content:
            return FAILED, f"the decoder changed its {name}"
    out = found.pop("out", None)
    if found:
        return FAILED, f"left behind: {', '.join(sorted(found))}"
    codes = re.findall(r"^(DELTA_[A-Z_]+)\b", done.stderr, re.MULTILINE)
    if vector.errors and done.status == 0 and vector.announced is not None:
        return SKIPPED, "it takes no announced target"
    if vector.errors:
        if done.status == 0:
            return FAILED, f"succeeded; {' or '.join(vector.errors)} was due"
        if not codes:
            return FAILED, f"exit status {done.status} without a code; {' or '.join(vector.errors)} was due"
        if codes[-1] not in vector.errors:
            return FAILED, f"{codes[-1]}; {' or '.join(vector.errors)} was due"
        return (FAILED, "left its output behind") if out is not None else (PASSED, codes[-1])
    if done.status != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
        return FAILED, f"exit status {done.status}: {last[0]}"
    if out is None:
        return FAILED, "no output"
    size = out.stat().st_size
    if size != vector.size:
        return FAILED, f"wrote {size} bytes; {vector.size} were due"
    if index.digest(out.read_bytes()) != vector.digest:
        return FAILED, "wrote another target"
    return PASSED, ""


def chosen(vectors: Sequence[Vector], only: Sequence[str]) -> list[Vector]:
    """The vectors whose names match one of the patterns; all without patterns."""
    return [v for v in vectors if not only or any(fnmatch.fnmatchcase(v.name, pattern) for pattern in only)]


def table(results: Sequence[Result], width: int) -> Iterator[str]:
    """Lines of up to `width` characters."""
    name = min(30, max(12, width // 3))
    yield f"{'vector':<{name}} {'outcome':<8}{'ms':>7}{'MiB':>6}  why"[:width]
    for result in results:
        numbers = f"{result.seconds * 1000:>7.0f}{result.peak_mib:>6.0f}"
        yield f"{result.name[:name]:<{name}} {result.outcome:<8}{numbers}  {result.why}"[:width].rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if no vector failed, 1 if one did, 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m edge_tests.conformance.delta", description=__doc__)
    parser.add_argument("--decoder", required=True, metavar="CMD", help="run as CMD BASE_OR_DASH DELTA OUT")
    parser.add_argument("--vectors", type=Path, default=VECTORS, metavar="DIR")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a name or a pattern (*); repeat"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, metavar="S", help="for one vector")
    parser.add_argument(
        "--memory", type=int, default=MEMORY_MIB, metavar="MIB", help="that a decoder may hold"
    )
    options = parser.parse_args(arguments)
    vectors = chosen(index.load(options.vectors), options.only)
    if not vectors:
        print(f"no vector is named {', '.join(options.only)}", file=sys.stderr)
        return 2
    command = shlex.split(options.decoder)
    results = [check(command, v, options.vectors, options.deadline, options.memory) for v in vectors]
    counts = {kind: sum(result.outcome == kind for result in results) for kind in (PASSED, FAILED, SKIPPED)}
    if options.json:
        print(json.dumps({"counts": counts, "results": [asdict(result) for result in results]}, indent=1))
    else:
        print("\n".join(table(results, shutil.get_terminal_size().columns)))
        slowest = max(results, key=lambda result: result.seconds)
        print(
            f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped of {len(results)}; "
            f"slowest {slowest.name}, {slowest.seconds:.2f} s"
        )
    return int(counts[FAILED] > 0)


if __name__ == "__main__":
    sys.exit(main())
