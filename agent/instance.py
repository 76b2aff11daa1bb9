"""One process of a loaded version: start it, ask it, hear of its death, end it.

A version has one or more of these behind one queue (worker.py, batching.py); each answers one request, or
batch, at a time. Whoever calls `run`, they take turns. What goes wrong:

- The caller's own deadline passes: the caller gets WORKER_TIMEOUT, the process goes on, and its late answer
  is thrown away before the next request is sent.
- A request runs longer than the hang limit, and longer than its caller was ready to wait: the process is
  killed. A short deadline of one client therefore never kills a process that serves others.
- The process dies: `WorkerDied`, which says whether the request had reached it, and `on_end` is called.

Rules: no process outlives its handle's `close`, none is left unreaped, and none outlives the agent.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from agent import worker_process
from agent.child import Child
from agent.figures import Figures, Timing
from agent.limits import EXIT_S
from agent.priority import give_way, restore
from agent.staging import Staged, Staging, joined
from agent.transport import ChannelBroken, ChannelClosed, Message, MessageTooLarge
from agent.worker_spec import LoadCrashed, WorkerDied, WorkerSpec
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

log = logging.getLogger(__name__)

_INFER = {"op": "infer"}


class Instance:
    """A process; after `begin_load` and `end_load` it answers.

    Args:
        spec: what to load.
        staging: where its version's inputs are put.
        on_end: called with it, in a thread of its own, once the process ended and was reaped.

    Attributes:
        spec: as given.
        runtime: the name of the runtime that loaded the model.
        accelerator: what it runs on, the first of the spec's that works.
        inputs: what the model wants.
        outputs: what it answers.
        ready_at: when it became ready (time.monotonic); 0 before.
        figures: of its version's inferences.
        outgrown: it is ended because it held too much memory, which is no death.
    """

    def __init__(self, spec: WorkerSpec, staging: Staging, on_end: Callable[[Instance], None]) -> None:
        """Starts the process. Raises SluiceError(IO_FAILED) when the system cannot start another."""
        self.spec = spec
        self.runtime = self.accelerator = ""
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.ready_at = 0.0
        self.figures = Figures()
        self.requests = 0  # clients' requests sent to the process
        self.outgrown = False
        self.failures = 0  # those that it did not answer, or whose inputs made the model fail
        self._listener = on_end
        self._turn = threading.Lock()  # held by the one caller who may use the channel
        self._unanswered = False  # under _turn: a request was sent and its answer not yet taken
        self._reads: Staged | None = None  # under _turn: the running request's inputs, if staged
        self._busy_since: float | None = None  # since when the running request runs (time.monotonic)
        self._loading = False
        self._child = Child(str(spec), spec.threads, staging.share, self._on_end)
        self._gives_way = spec.beside and give_way(self._child.pid)

    @property
    def ended(self) -> bool:
        """Whether the process ended and was reaped."""
        return self._child.ended

    @property
    def pid(self) -> int:
        return self._child.pid

    def resident_bytes(self) -> int:
        """Physical memory that the process uses; 0 when it has ended."""
        return self._child.resident_bytes()

    def busy_s(self) -> float:
        """For how long the running request has been running, seconds; 0 when none runs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def run(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], timeout_s: float
    ) -> tuple[dict[str, NDArray[Any]], Timing]:
        """Runs inputs that `Worker.check` returned, joined along their first dimension if they are several.

        Returns:
            An array for each of `self.outputs`, and where the time went.

        Raises:
            SluiceError: INPUT_INVALID (the model failed on the inputs), LIMIT_EXCEEDED (they are too large),
                WORKER_TIMEOUT, WORKER_DIED (as `WorkerDied`).
        """
        began = time.monotonic()
        deadline = began + timeout_s
        if not self._turn.acquire(timeout=max(0.0, timeout_s)):
            raise self.timeout("the request waited for its turn until its deadline")
        try:
            self._clear_late_answer(deadline)
            queue_s = time.monotonic() - began
            outputs, timing = self._exchange(inputs, deadline, timeout_s)
        finally:
            self._turn.release()
        timing.queue_s = queue_s
        return outputs, timing

    def take_share(self) -> None:
        """Gives way to nobody any more: what it loaded has proven itself."""
        if self._gives_way:
            self._gives_way = False
            restore(self.pid)

    def private_bytes(self) -> int:
        """Memory of its own, neither shared nor of files (see growth.py), bytes; 0 when it has ended."""
        return self._child.private_bytes()

    def kill(self, why: str = "") -> None:
        """Ends the process at once; no effect when it has ended. `why` is told with its last words."""
        self._child.kill(why)

    def close(self) -> None:
        """Ends and reaps the process; a request that runs gets WORKER_DIED. Never raises; may be repeated."""
        self._child.end()

    # Starting.

    def begin_load(self, deadline_s: float) -> None:
        """Has the process begin to load the model, within `deadline_s`.

        Raises SluiceError as `Worker.start`.
        """
        with self._starting(deadline_s):
            self._child.channel.receive(deadline_s)
            self._loading = True
            self._child.channel.send(
                {
                    "op": "load",
                    "path": str(self.spec.path.absolute()),
                    "format": self.spec.format,
                    "preferred": self.spec.runtime_preference,
                    "threads": self.spec.threads,
                    "accelerators": list(self.spec.accelerators),
                    "optimization": self.spec.optimization,
                    "xnnpack": self.spec.xnnpack,
                    "delegates": [
                        [each.name, each.library, dict(each.options)]
                        for each in self.spec.delegates
                        if each.name in self.spec.accelerators
                    ],
                }
            )

    def end_load(self, deadline_s: float, left_s: float) -> None:
        """Waits `left_s` of the `deadline_s` until it is loaded. Raises SluiceError as `Worker.start`."""
        with self._starting(deadline_s):
            answer = self._child.channel.receive(left_s)
        if answer.header.get("op") != "ready":
            raise self._load_error(answer)
        self.runtime = answer.header["runtime"]
        self.accelerator = answer.header["accelerator"]
        for reason in answer.header["passed_over"]:
            log.warning("%s runs on %s: %s", self.spec, self.accelerator, reason)
        self.inputs = tuple(
            TensorSpec(name, kind, tuple(shape)) for name, kind, shape in answer.header["inputs"]
        )
        self.outputs = tuple(
            TensorSpec(name, kind, tuple(shape)) for name, kind, shape in answer.header["outputs"]
        )
        self.ready_at = time.monotonic()

    @contextlib.contextmanager
    def _starting(self, deadline_s: float) -> Iterator[None]:
        """What can go wrong with the channel meanwhile, as callers know it."""
        try:
            yield
        except TimeoutError:
            why = f"its worker did not load it within {deadline_s:g} s"
            raise self.timeout(why, "raise update.load_deadline_s, or ship a smaller model") from None
        except (ChannelClosed, ChannelBroken) as error:
            raise self._died_while_starting(self._loading, error) from error

    def _died_while_starting(self, loading: bool, error: Exception) -> SluiceError:
        self._settle_end(error)
        if self._child.was_killed:
            return SluiceError(
                errors_pb2.OUT_OF_MEMORY,
                f"loading {self.spec} ended its worker: it {self._child.last_words()}",
                hint="it is tried again; if the box is short of memory, ship a smaller variant",
                obj=str(self.spec),
            )
        if loading:
            return LoadCrashed(
                errors_pb2.MODEL_LOAD_FAILED,
                f"loading {self.spec} ended its worker: it {self._child.last_words()}",
                hint="the model crashes its runtime on this box",
                obj=str(self.spec),
            )
        message = f"the worker for {self.spec} did not start: it {self._child.last_words()}"
        return WorkerDied(message, obj=str(self.spec), delivered=False)

    def _load_error(self, answer: Message) -> SluiceError:
        header = answer.header
        if header.get("kind") == worker_process.UNAVAILABLE:
            reason, hint = errors_pb2.RUNTIME_UNAVAILABLE, "`sluice-agent doctor` lists the runtimes"
        else:
            reason, hint = errors_pb2.MODEL_LOAD_FAILED, "try the file with the runtime on another machine"
        return SluiceError(
            reason,
            f"cannot load {self.spec}: {header.get('message', header)}",
            hint=header.get("hint") or hint,  # the runtime knows better
            obj=str(self.spec),
        )

    # One request.

    def _clear_late_answer(self, deadline: float) -> None:
        """Takes the answer that an earlier caller no longer waited for; the process is then free."""
        if not self._unanswered:
            return
        try:
            self._child.channel.receive(deadline - time.monotonic())
        except TimeoutError:
            raise self.timeout("an earlier request was still running at the deadline") from None
        except (ChannelClosed, ChannelBroken) as error:
            raise self._lost(error, delivered=False) from error
        self._idle()

    def _exchange(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], deadline: float, timeout_s: float
    ) -> tuple[dict[str, NDArray[Any]], Timing]:
        if self._child.ended:
            raise self._lost(ChannelClosed("it had ended before"), delivered=False)
        began = time.monotonic()
        if began >= deadline:
            raise self.timeout("the request waited for its turn until its deadline")
        whole = joined(inputs)
        if whole is not None and whole.hold():
            self._reads, inputs = whole, (whole,)
        elif whole is not None and len(inputs) == 1:
            raise self.timeout("the client no longer waits for the answer")
        try:
            self._child.channel.send(_INFER, *inputs)
        except MessageTooLarge as error:
            self._idle()
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED, f"the inputs for {self.spec}: {error}", obj=str(self.spec)
            ) from error
        except (ChannelClosed, ChannelBroken) as error:
            raise self._lost(error, delivered=False) from error
        self._unanswered, self._busy_since = True, began
        self.requests += 1
        sent = time.monotonic()
        try:
            answer = self._child.channel.receive(deadline - sent)
        except TimeoutError:
            self.failures += 1
            self._give_up(began, timeout_s)
            raise self.timeout(f"no answer within {timeout_s:g} s") from None
        except (ChannelClosed, ChannelBroken) as error:
            self.failures += 1
            raise self._lost(error, delivered=True) from error
        self._idle()
        if answer.header.get("op") == "outputs":
            return answer.tensors, Timing(input_s=sent - began, infer_s=time.monotonic() - sent)
        self.failures += 1
        what = (
            "" if answer.header.get("kind") == worker_process.INPUT else "the model failed on these inputs: "
        )
        why = what + str(answer.header.get("message", answer.header))
        raise self._input_invalid(why, str(answer.header.get("hint", "")))

    def _idle(self) -> None:
        self._unanswered, self._busy_since = False, None
        if self._reads is not None:
            self._reads.drop()
            self._reads = None

    def _give_up(self, began: float, timeout_s: float) -> None:
        """Leaves a running request alone, to be killed at the hang limit unless its answer comes."""
        hang_at = began + max(self.spec.hang_s, timeout_s)
        self._child.set_alarm(
            hang_at, lambda: self._busy_since == began and not self._child.channel.readable(0)
        )

    # Ends and errors.

    def _on_end(self) -> None:
        """In the watching thread: the process ended and was reaped."""
        with self._turn:  # whoever uses the channel sees its end and lets go
            self._child.channel.close()
            self._idle()
        self._listener(self)

    def last_words(self) -> str:
        """How the process ended, for messages."""
        return self._child.last_words()

    def _settle_end(self, error: Exception) -> None:
        """After a broken conversation: makes sure that the process ends, so that its last words are whole."""
        if isinstance(error, ChannelBroken) or not self._child.wait(EXIT_S):
            self._child.kill()
            self._child.wait(EXIT_S)

    def _lost(self, error: Exception, *, delivered: bool) -> WorkerDied:
        self._settle_end(error)
        name = f"the worker of {self.spec} (process {self.pid})"
        if isinstance(error, ChannelBroken):
            text = f"{name} broke off the conversation ({error}) and was ended;"
        else:
            text = f"{name} {self._child.last_words()};"
        where = "it was running this request" if delivered else "it had not taken this request"
        killed = self._child.was_killed
        return WorkerDied(f"{text} {where}", obj=str(self.spec), delivered=delivered, killed=killed)

    def timeout(
        self, why: str, hint: str = "allow more time, or send fewer requests at a time"
    ) -> SluiceError:
        """The error for what took too long."""
        return SluiceError(errors_pb2.WORKER_TIMEOUT, f"{self.spec}: {why}", hint=hint, obj=str(self.spec))

    def _input_invalid(self, why: str, hint: str) -> SluiceError:
        return SluiceError(errors_pb2.INPUT_INVALID, f"{self.spec}: {why}", hint=hint, obj=str(self.spec))
