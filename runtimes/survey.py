"""Probes every runtime in a process of its own.

A library built for another chip dies of SIGILL at import, and one that works holds its memory for the
life of the process. A daemon wants neither, so each probe runs in a child with a deadline: `python -m
runtimes.survey NAME` prints the probe as JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from runtimes import registry
from runtimes.interface import Probe, Runtime

PROBE_TIMEOUT_S = 60.0  # a Pi Zero 2 W on a slow card imports for some seconds

_SOURCE = Path(__file__).resolve().parent.parent  # so that the child imports this very package
_MAX_OUTPUT_CHARS = 500  # of a failed child's last words in an error


def survey(timeout_s: float = PROBE_TIMEOUT_S) -> list[Probe]:
    """Like `registry.probe_all`, with crashes and hangs named as errors.

    Args:
        timeout_s: for each runtime, in seconds.
    """
    return [_probe_apart(runtime, timeout_s) for runtime in registry.RUNTIMES]


def _probe_apart(runtime: Runtime, timeout_s: float) -> Probe:
    try:
        child = subprocess.run(
            [sys.executable, "-m", "runtimes.survey", runtime.name],
            cwd=_SOURCE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _failed(runtime, f"its probe did not end within {timeout_s:g} s")
    except OSError as error:
        return _failed(runtime, f"its probe could not be started: {error.strerror or error}")
    if child.returncode < 0:
        return _failed(runtime, f"its probe was ended by {_signal_name(-child.returncode)}")
    if child.returncode:
        last_words = child.stderr.strip()[-_MAX_OUTPUT_CHARS:]
        return _failed(runtime, f"its probe ended with status {child.returncode}: {last_words}")
    return _parse(runtime, child.stdout)


def _parse(runtime: Runtime, output: str) -> Probe:
    lines = output.strip().splitlines()
    try:
        fields = json.loads(lines[-1] if lines else "")
        return Probe(
            runtime=fields["runtime"],
            version=fields["version"],
            formats=tuple(fields["formats"]),
            accelerators=tuple(fields["accelerators"]),
            error=fields["error"],
            hint=fields["hint"],
        )
    except (ValueError, KeyError, TypeError) as error:
        return _failed(runtime, f"its probe printed no result: {error}")


def _failed(runtime: Runtime, why: str) -> Probe:
    return Probe(runtime.name, "", runtime.formats, (), f"{runtime.name} cannot be used: {why}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(registry.probe(sys.argv[1]))) + "\n")
