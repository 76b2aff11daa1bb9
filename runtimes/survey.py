"""Probes every runtime in a process of its own.

A library built for another chip dies of SIGILL at import, and one that works holds its memory for the
life of the process. A daemon wants neither, so each probe runs in a child with a deadline: `python -m
runtimes.survey NAME` prints the probe as JSON. An external delegate is tried in one more child, so that a
library that crashes costs its runtime nothing: with the delegate as JSON after NAME, the child prints why it
cannot be used.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from runtimes import registry
from runtimes.detect import TFLITE
from runtimes.interface import ExternalDelegate, Probe, Runtime, RuntimeFailure

PROBE_TIMEOUT_S = 60.0  # a Pi Zero 2 W on a slow card imports for some seconds

_SOURCE = Path(__file__).resolve().parent.parent  # so that the child imports this very package
_MAX_OUTPUT_CHARS = 500  # of a failed child's last words in an error


def survey(timeout_s: float = PROBE_TIMEOUT_S, delegates: tuple[ExternalDelegate, ...] = ()) -> list[Probe]:
    """Like `registry.probe_all`, with crashes and hangs named as errors.

    Args:
        timeout_s: for each runtime, and for each delegate in it, in seconds.
        delegates: of this box; those that work are among the accelerators of TensorFlow Lite's runtimes.
    """
    return [
        _with_delegates(runtime, _probe_apart(runtime, timeout_s), delegates, timeout_s)
        for runtime in registry.RUNTIMES
    ]


def _with_delegates(
    runtime: Runtime, probe: Probe, delegates: tuple[ExternalDelegate, ...], timeout_s: float
) -> Probe:
    if not probe.usable or TFLITE not in runtime.formats:
        return probe
    errors = {each.name: _try_apart(runtime, each, timeout_s) for each in delegates}
    return replace(
        probe,
        accelerators=(*(name for name, error in errors.items() if not error), *probe.accelerators),
        passed_over=tuple(f"{name} is not used: {error}" for name, error in errors.items() if error),
    )


def _try_apart(runtime: Runtime, delegate: ExternalDelegate, timeout_s: float) -> str:
    """Why the delegate cannot be used; empty if it can."""
    told = _ask_child(runtime, timeout_s, json.dumps(asdict(delegate)))
    if isinstance(told, Probe):
        return told.error
    lines = told.strip().splitlines()
    try:
        return str(json.loads(lines[-1] if lines else "")["error"])
    except (ValueError, KeyError, TypeError) as error:
        return f"its probe printed no result: {error}"


def _probe_apart(runtime: Runtime, timeout_s: float) -> Probe:
    told = _ask_child(runtime, timeout_s)
    return told if isinstance(told, Probe) else _parse(runtime, told)


def _ask_child(runtime: Runtime, timeout_s: float, *arguments: str) -> str | Probe:
    """What the child printed, or what it failed of."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "runtimes.survey", runtime.name, *arguments],
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
    return child.stdout


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


def _main(name: str, *delegates: str) -> dict[str, object]:
    if not delegates:
        return asdict(registry.probe(name))
    fields = json.loads(delegates[0])
    delegate = ExternalDelegate(fields["name"], fields["library"], tuple(map(tuple, fields["options"])))
    runtime = next(each for each in registry.RUNTIMES if each.name == name)
    try:
        runtime.check_accelerator(delegate.name, (delegate,))
    except RuntimeFailure as error:
        return {"error": str(error)}
    return {"error": ""}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(*sys.argv[1:])) + "\n")
