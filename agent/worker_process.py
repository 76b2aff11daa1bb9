"""The worker: a process of its own that holds one loaded model and answers one request after the other.

Started as `python -m agent.worker_process REQUESTS_FD ANSWERS_FD ARENA_FD ARENA_FD ARENA_FD LIFELINE_FD
LABEL` by child.py, with the descriptors inherited: two pipes; three arenas, the first the agent's to write,
the second ours, the third the agent's again, which all processes of the version share; the lifeline. In
order: put signals, name and memory priority right; watch the lifeline; say "started"; take one "load" message
and answer "ready" or "error"; then answer "infer" messages until the channel ends.

Rules: only the standard library, NumPy and the runtime are imported, so that a worker costs little more than
its model (no gRPC, no protobuf, hence no `updater`). The lifeline is a pipe that nobody writes to: it ends
when the agent ends, however it ends, and then this process ends at once, also inside a long inference. A
failed request is answered and the process goes on; a crash is the parent's to notice.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from agent.arena import Arena
from agent.limits import MAX_ERROR_CHARACTERS, MAX_STAGED_BYTES, OOM_SCORE_ADJUST
from agent.transport import Channel, ChannelClosed, Message, MessageTooLarge
from runtimes.interface import (
    ExternalDelegate,
    InputInvalid,
    LoadOptions,
    Model,
    RuntimeFailure,
    RuntimeUnavailable,
    TensorSpec,
)
from runtimes.placement import load

# Kinds of an "error" answer.
UNAVAILABLE = "runtime-unavailable"  # no runtime for the format
REFUSED = "load-refused"  # the runtime does not take the model
INPUT = "input"  # the inputs do not fit the model
RUN = "run"  # the runtime failed on the inputs


def main(arguments: list[str]) -> int:
    """The life of the process; returns the exit code."""
    requests_fd, answers_fd, incoming_fd, outgoing_fd, staged_fd, lifeline_fd = map(int, arguments[:6])
    _settle(lifeline_fd)
    incoming, outgoing, staged = Arena(incoming_fd), Arena(outgoing_fd), Arena(staged_fd, MAX_STAGED_BYTES)
    for arena in (incoming, outgoing, staged):
        arena.close_descriptor()
    channel = Channel(requests_fd, answers_fd, outgoing, incoming, staged=staged, views=True)
    with contextlib.suppress(ChannelClosed):  # the agent let go of this worker, or is gone
        channel.send({"op": "started"})
        model = _load(channel, channel.receive(None))
        if model is None:
            return 1
        try:
            while True:
                _answer(channel, model, channel.receive(None))
        finally:
            model.close()
    return 0


def _settle(lifeline_fd: int) -> None:
    """Signals as at boot, a name for `ps`, a memory priority below the agent's, and the lifeline."""
    faulthandler.enable()  # a crash in native code leaves a trace on stderr, which the agent keeps
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ctrl-C in a terminal is the agent's to act on, which drains first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # both are a courtesy and work without privileges where /proc is whole
        Path("/proc/self/comm").write_text("sluice-worker", encoding="ascii")
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUST), encoding="ascii")
    threading.Thread(target=_follow_lifeline, args=(lifeline_fd,), name="lifeline", daemon=True).start()


def _follow_lifeline(lifeline_fd: int) -> None:
    while os.read(lifeline_fd, 1):
        pass
    os._exit(0)  # nothing here outlives the agent, and a running inference would not let us leave otherwise


def _load(channel: Channel, request: Message) -> Model | None:
    """Loads the model that the message names and answers; None when that failed."""
    header = request.header
    try:
        placed = load(
            Path(header["path"]),
            format=header["format"],
            preferred=header["preferred"],
            options=LoadOptions(
                threads=header["threads"],
                accelerators=tuple(header["accelerators"]),
                optimization=header["optimization"],
                xnnpack=header["xnnpack"],
                delegates=tuple(
                    ExternalDelegate(name, library, tuple(given.items()))
                    for name, library, given in header["delegates"]
                ),
            ),
        )
    except RuntimeUnavailable as error:
        _refuse(channel, UNAVAILABLE, error)
        return None
    except Exception as error:  # noqa: BLE001 - whatever the runtime raises is the answer
        _refuse(channel, REFUSED, error)
        return None
    model = placed.model
    channel.send(
        {
            "op": "ready",
            "runtime": model.runtime,
            "accelerator": placed.accelerator,
            "passed_over": [reason[:MAX_ERROR_CHARACTERS] for reason in placed.passed_over],
            "inputs": [_spec(item) for item in model.inputs],
            "outputs": [_spec(item) for item in model.outputs],
        }
    )
    return model


def _answer(channel: Channel, model: Model, request: Message) -> None:
    try:
        outputs = model.run(request.tensors)
    except InputInvalid as error:
        _refuse(channel, INPUT, error)
        return
    except Exception as error:  # noqa: BLE001 - whatever the runtime raises is the answer
        _refuse(channel, RUN, error)
        return
    try:
        channel.send({"op": "outputs"}, outputs)
    except (MessageTooLarge, InputInvalid) as error:
        _refuse(channel, RUN, error)


def _refuse(channel: Channel, kind: str, error: Exception) -> None:
    text, hint = (error.message, error.hint) if isinstance(error, RuntimeFailure) else (str(error), "")
    text = text.strip() or type(error).__name__
    channel.send(
        {
            "op": "error",
            "kind": kind,
            "message": text[:MAX_ERROR_CHARACTERS],
            "hint": hint[:MAX_ERROR_CHARACTERS],
        }
    )


def _spec(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.datatype, list(spec.shape)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
