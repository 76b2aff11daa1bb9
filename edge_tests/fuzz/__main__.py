"""`make fuzz`: feeds the delta decoder inputs that lead to new code, for some time.

With --requests it is the inference front's decoder of requests, with --files the readers of model files.

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
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["updater.delta", "updater.formats", "agent.messages", "agent.tensors"]
):
    from edge_tests.fuzz import corpus, files, requests
    from edge_tests.fuzz.deltas import case_of
    from edge_tests.fuzz.examine import examine, workplace

WORK = Path(".cache") / "fuzz"
SECONDS = 60  # of a run, unless told otherwise
_MEMORY_MIB = 1024  # that the fuzzer itself may hold
_STATUS_S = 15.0
# Beside deltas: what takes an input, the inputs to begin with, and the most bytes of one.
_OTHERS = {
    "requests": (requests.examine_request, requests.seeds, corpus.INPUT_BYTES),
    "files": (files.examine_file, files.seeds, files.MOST_BYTES),
}
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


def _seeds(directory: Path, seeds: Sequence[bytes]) -> Path:
    """Inputs to begin with as files, beside what earlier runs found."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
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
    for name, (take, _, _) in _OTHERS.items():
        if sys.argv[1:3] == [f"--{name}", "--"]:
            atheris.Setup([sys.argv[0], *sys.argv[3:]], take)
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
    other = parser.add_mutually_exclusive_group()
    for name, what in (
        ("requests", "the inference front's decoder of requests"),
        ("files", "the readers of model files"),
    ):
        other.add_argument(f"--{name}", action="store_const", const=name, dest="other", help=what)
    parser.add_argument("--input", type=Path, help="a file to run alone")
    options = parser.parse_args()
    if options.input is not None and options.other:
        print(_OTHERS[options.other][0](options.input.read_bytes()))
        return 0
    if options.input is not None:
        with workplace() as directory:
            print(examine(case_of(options.input.read_bytes()), directory, memory=True))
        return 0
    longest, target = corpus.INPUT_BYTES, ["--"]
    if options.other:
        _, seeds, longest = _OTHERS[options.other]
        found, target = _seeds(WORK / options.other, seeds()), [f"--{options.other}", "--"]
    else:
        found = _unpack(WORK / "corpus")
    limits = [f"-max_len={longest}", f"-rss_limit_mb={_MEMORY_MIB}", "-timeout=60", "-verbosity=0"]
    limits += [f"-artifact_prefix={WORK}/", "-print_final_stats=1"]
    status = _fuzz([*target, *limits, f"-max_total_time={options.seconds}", str(found)])
    if status:
        print(f"an input broke the decoder's word: see {WORK}; run it again with --input FILE")
        return status
    if options.keep and not options.other:
        print(f"{keep(found)} inputs are kept in {corpus.FILE.name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
