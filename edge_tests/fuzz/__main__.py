"""`make fuzz`: feeds the delta decoder inputs that lead to new code, for some time.

With --requests it is the inference front's decoder of requests.

Starts from the kept inputs. With --keep those that reach something new are kept, and the whole is made as
small as it can be without losing ground. An input that breaks the decoder's word stops the run; its file is
named and `--input FILE` runs it alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["updater.delta", "agent.messages", "agent.tensors"]):
    from edge_tests.fuzz import corpus
    from edge_tests.fuzz.deltas import case_of
    from edge_tests.fuzz.examine import examine, workplace
    from edge_tests.fuzz.requests import examine_request, seeds

WORK = Path(".cache") / "fuzz"
SECONDS = 60  # of a run, unless told otherwise
_MEMORY_MIB = 1024  # that the fuzzer itself may hold
_STATUS_S = 15.0
_REQUESTS = "--requests"
_REACHED = "updater/delta/"  # whose lines count


class Target:
    """What the fuzzer calls."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._counts: Counter[str] = Counter()
        self._slowest = 0.0
        self._said = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """Examines one input."""
        outcome = examine(case_of(data), self._directory)
        self._counts[outcome.code] += 1
        self._slowest = max(self._slowest, outcome.seconds)
        if time.monotonic() - self._said > _STATUS_S:
            self._said = time.monotonic()
            counts = ", ".join(f"{code} {count}" for code, count in sorted(self._counts.items()))
            print(f"{self._counts.total()} inputs: {counts}; slowest {self._slowest:.3f} s", flush=True)


def _unpack(directory: Path) -> Path:
    """The kept inputs as files, beside what earlier runs found."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(corpus.load()):
        (directory / f"kept-{number:05}").write_bytes(data)
    return directory


def _seeds(directory: Path) -> Path:
    """Requests to begin with as files, beside what earlier runs found."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()):
        (directory / f"seed-{number:02}").write_bytes(data)
    return directory


def _fuzz(arguments: list[str]) -> int:
    """LibFuzzer in a process of its own, for it ends the process that it runs in."""
    return subprocess.run([sys.executable, "-m", "edge_tests.fuzz", *arguments], check=False).returncode


def keep(directory: Path) -> int:
    """Stores the fewest inputs of a directory that reach all that they reach together; gives their number."""
    with workplace() as place:

        def reach(data: bytes) -> frozenset[tuple[str, int, int]]:
            case = case_of(data)
            return corpus.reached(lambda: examine(case, place), _REACHED)

        return corpus.store(corpus.smallest((path.read_bytes() for path in directory.iterdir()), reach))


def main() -> int:
    """Runs the command; gives its exit status."""
    if sys.argv[1:3] == [_REQUESTS, "--"]:
        atheris.Setup([sys.argv[0], *sys.argv[3:]], examine_request)
        atheris.Fuzz()
        return 0
    if sys.argv[1:2] == ["--"]:
        with workplace() as directory:
            atheris.Setup([sys.argv[0], *sys.argv[2:]], Target(directory))
            atheris.Fuzz()
        return 0
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--keep", action="store_true", help="keep what reaches something new")
    parser.add_argument(_REQUESTS, action="store_true", help="the inference front's decoder of requests")
    parser.add_argument("--input", type=Path, help="a file to run alone")
    options = parser.parse_args()
    if options.input is not None and options.requests:
        print(examine_request(options.input.read_bytes()))
        return 0
    if options.input is not None:
        with workplace() as directory:
            print(examine(case_of(options.input.read_bytes()), directory, memory=True))
        return 0
    found = _seeds(WORK / "requests") if options.requests else _unpack(WORK / "corpus")
    limits = [f"-max_len={corpus.INPUT_BYTES}", f"-rss_limit_mb={_MEMORY_MIB}", "-timeout=60", "-verbosity=0"]
    limits += [f"-artifact_prefix={WORK}/", "-print_final_stats=1"]
    target = [_REQUESTS, "--"] if options.requests else ["--"]
    status = _fuzz([*target, *limits, f"-max_total_time={options.seconds}", str(found)])
    if status:
        print(f"an input broke the decoder's word: see {WORK}; run it again with --input FILE")
        return status
    if options.keep and not options.requests:
        print(f"{keep(found)} inputs are kept in {corpus.FILE.name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
