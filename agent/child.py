"""A worker's operating-system side: starting the process, hearing it end, ending it, keeping its last words.

`Child` starts `agent.worker_process` with a pipe and an arena for each direction, the arena that its
version's processes share, and the reading end of a lifeline pipe.
One thread per child waits for three things: output (kept as a bounded tail and logged), the end of the
process (reaped at once, so there are no zombies) and the moment at which a request must have been answered.

Rules: `subprocess` starts the process without running Python between fork and exec, so it is safe beside
threads; systemd's descriptors and sockets are not handed on. The process stays in the agent's session: in one
of its own, Linux (sched_autogroup_enabled) would have it compete with the agent and every other session for
equal shares, and on a busy box each request would wait for the worker's share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import agent
from agent.arena import Arena
from agent.limits import EXIT_S, STDERR_TAIL_BYTES, STDERR_TAIL_LINES
from agent.transport import Channel
from updater.errors import os_errors

log = logging.getLogger(__name__)

_SOURCE_ROOT = Path(agent.__file__).resolve().parent.parent
# Set before the libraries load: they read these once. LiteRT and ONNX Runtime also take the number directly.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CRASH_TRACE = "Fatal Python error"  # how faulthandler begins; what matters follows it
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID")


class Child:
    """One worker process and the agent's end of its channel.

    Args:
        label: shown by `ps`, e.g. "detector@3".
        threads: for the libraries that read their number of threads from the environment.
        share: gives a descriptor of the arena in which its version's inputs are put; may raise OSError.
        on_end: called once, in the watching thread, after the process ended and was reaped.

    Attributes:
        ended: whether the process ended and was reaped.
        channel: to it.

    Raises SluiceError(IO_FAILED) when the system cannot start another process.
    """

    def __init__(
        self, label: str, threads: int, share: Callable[[], int], on_end: Callable[[], None]
    ) -> None:
        self._on_end = on_end
        self._label = label
        self._tail = b""
        self.ended = False
        self._ended = threading.Event()
        self._wake_lock = threading.Lock()  # a descriptor's number may be another file's once it is closed
        self._alarm: tuple[float, Callable[[], bool]] | None = None
        self._we_killed = False
        self._why = ""
        with (
            os_errors("starting a worker process for", label),
            contextlib.ExitStack() as undo,
            contextlib.ExitStack() as handed_over,
        ):
            requests, ask = _pipe(reader=handed_over, writer=undo)
            listen, answers = _pipe(reader=undo, writer=handed_over)
            lifeline, self._lifeline = _pipe(reader=handed_over, writer=undo)
            arenas = [Arena.create(), Arena.create()]
            for arena in arenas:
                handed_over.callback(arena.close_descriptor)
            staged = share()
            handed_over.callback(os.close, staged)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._wake)
            descriptors = (requests, answers, *(arena.descriptor for arena in arenas), staged, lifeline)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent.worker_process", *map(str, descriptors), label],
                cwd=_SOURCE_ROOT,
                env=_environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                bufsize=0,
            )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.pop_all()
        self.channel = Channel(listen, ask, *arenas)
        threading.Thread(target=self._watch, name=f"worker-{self._process.pid}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def was_killed(self) -> bool:
        """Whether it was killed and not by us: by someone, or by the kernel for want of memory."""
        return self._process.returncode == -signal.SIGKILL and not self._we_killed

    def wait(self, timeout_s: float) -> bool:
        """Whether the process ended within `timeout_s`."""
        return self._ended.wait(timeout_s)

    def kill(self, why: str = "") -> None:
        """Ends the process at once; no effect when it has ended. `why` is told with its last words."""
        self._we_killed, self._why = True, why
        self._process.kill()

    def end(self) -> None:
        """Lets the process end by itself, then terminates it, then kills it; returns once it is reaped."""
        self._we_killed = True
        self.channel.shutdown()
        for harder in (self._process.terminate, self._process.kill):
            if self._ended.wait(EXIT_S):
                return
            log.warning("worker %s (process %d) does not end; insisting", self._label, self.pid)
            harder()
        if not self._ended.wait(EXIT_S):
            log.error("worker %s (process %d) was killed and is still there", self._label, self.pid)

    def set_alarm(self, at: float, hung: Callable[[], bool]) -> None:
        """At `at` (time.monotonic), kills the process if `hung()`; replaces an earlier alarm."""
        with self._wake_lock:
            if self._wake >= 0:  # else the process ended, and its watcher with it
                self._alarm = (at, hung)
                os.eventfd_write(self._wake, 1)

    def resident_bytes(self) -> int:
        """Physical memory in use; 0 when the process ended."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        except (OSError, IndexError):
            return 0
        return 0 if self.ended else int(pages) * os.sysconf("SC_PAGE_SIZE")

    def private_bytes(self) -> int:
        """Memory of its own, in RAM or swapped out, without what is shared and the pages of files; 0 when the
        process ended.
        """
        try:
            lines = (
                Path(f"/proc/{self.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
            )
        except OSError:
            return 0
        fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
        return 0 if self.ended else sum(int(value.split()[0]) << 10 for value in fields.values())

    def last_words(self) -> str:
        """How the process ended and the end of its output, for an error message."""
        code = self._process.returncode
        if code is None:
            how = "is still running"
        elif code < 0:
            how = f"was ended by {_signal_name(-code)}"
            if self._why:
                how += f" of the agent: {self._why}"
            elif -code == signal.SIGKILL:
                how += " (by someone, or by the kernel for want of memory: see dmesg)"
        else:
            how = f"exited with code {code}"
        lines = self._tail.decode("utf-8", "replace").strip().splitlines()
        crash = next((at for at, line in enumerate(lines) if line.startswith(_CRASH_TRACE)), None)
        shown = lines[-STDERR_TAIL_LINES:] if crash is None else lines[crash : crash + STDERR_TAIL_LINES]
        return f"{how}; its last output: {' | '.join(shown)}" if shown else f"{how} without output"

    def _watch(self) -> None:
        output = self._process.stdout
        assert output is not None  # PIPE was asked for
        os.set_blocking(output.fileno(), False)
        poll = select.poll()
        for descriptor in (output.fileno(), self._pidfd, self._wake):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = dict(poll.poll(self._alarm_ms()))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if output.fileno() in ready and not self._take_output(output.fileno()):
                poll.unregister(output.fileno())
            self._ring()
            if self._pidfd in ready:
                break
        self._take_output(output.fileno())
        self._process.wait()
        output.close()
        os.close(self._pidfd)
        os.close(self._lifeline)
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        self.ended = True
        self._ended.set()
        self._on_end()

    def _take_output(self, descriptor: int) -> bool:
        """Reads what is there, up to a bound; False at the end of the output."""
        for _ in range(16):
            try:
                data = os.read(descriptor, STDERR_TAIL_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._tail = (self._tail + data)[-STDERR_TAIL_BYTES:]
            log.debug("worker %s: %s", self._label, data.decode("utf-8", "replace").rstrip())
        return True

    def _alarm_ms(self) -> int | None:
        alarm = self._alarm
        return None if alarm is None else max(0, int((alarm[0] - time.monotonic()) * 1000) + 1)

    def _ring(self) -> None:
        alarm = self._alarm
        if alarm is None or time.monotonic() < alarm[0]:
            return
        self._alarm = None
        if alarm[1]():
            log.error("worker %s (process %d) hangs: killing it", self._label, self.pid)
            self.kill()


def _pipe(*, reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's ends, to read from and to write to, and who closes which."""
    ends = os.pipe()
    for stack, end in zip((reader, writer), ends):
        stack.callback(os.close, end)
    return ends


def _environment(threads: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    return environment


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
