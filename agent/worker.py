"""The agent's handle on one worker process: start it, ask it, hear of its death, end it.

`Worker.start` starts the process, has it load the model and returns once it is ready. Clients' requests come
through `queue` (batching.py), which has one thread at a time call `run`; `infer` goes past it, for checks.
Whoever calls, they take turns, because the process answers one request at a time. What goes wrong:

- The caller's own deadline passes: the caller gets WORKER_TIMEOUT, the worker goes on, and its late answer is
  thrown away before the next request is sent.
- A request runs longer than the worker's hang limit, and longer than its caller was ready to wait: the
  process is killed. A short deadline of one client therefore never kills a worker that serves others.
- The process dies: `WorkerDied`, which says whether the request had reached it, and the death callbacks run.

Rules: no process outlives its handle's `close`, none is left unreaped, and none outlives the agent.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent import worker_process
from agent.batching import Batcher
from agent.cascade import Cascade
from agent.child import Child
from agent.figures import Figures, Timing
from agent.limits import EXIT_S
from agent.priority import give_way, restore
from agent.staging import Place, Staged
from agent.transport import ChannelBroken, ChannelClosed, Message, MessageTooLarge
from agent.version_policy import VersionPolicy
from agent.worker_spec import LoadCrashed, WorkerDied, WorkerSpec
from runtimes.inputs import check_inputs, splits_by_sample
from runtimes.interface import InputInvalid, TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

if TYPE_CHECKING:
    from agent.shadow import Shadow

log = logging.getLogger(__name__)

_INFER = {"op": "infer"}


class Worker:
    """A running worker process; made by `start`.

    Attributes:
        spec: what it was started with.
        runtime: the name of the runtime that loaded the model.
        accelerator: what it runs on, the first of the spec's that works.
        inputs: what the model wants.
        outputs: what it answers.
        ready_at: when it became ready (time.monotonic).
        figures: of its version's inferences.
        queue: where clients' requests wait for it.
        cache_s: for how long its answers may be given again to the same inputs, seconds; 0: never.
        versions: which others of its model are loaded beside it while it is active; None: none.
        cascade: whom it hands samples on to that it is unsure of; None: nobody.
        shadow: what takes copies of its requests and answers, for a version that may follow it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Starts the process; `start` is the way to a worker that is ready."""
        self.spec = spec
        self.runtime = self.accelerator = ""
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.ready_at = 0.0
        self.figures = Figures()
        self.queue = Batcher(self, str(spec))
        self.cache_s = 0.0
        self.cascade: Cascade | None = None
        self.versions: VersionPolicy | None = None
        self.shadow: Shadow | None = None
        self._any_batch = False
        self._turn = threading.Lock()  # held by the one caller who may use the channel
        self._unanswered = False  # under _turn: a request was sent and its answer not yet taken
        self._reads: Place | None = None  # under _turn: where the running request's inputs lie, if staged
        self._busy_since: float | None = None  # since when the running request runs (time.monotonic)
        self._lock = threading.RLock()  # guards what follows
        self._state = threading.Condition(self._lock)
        self._users = 0
        self._requests = 0
        self._failures = 0
        self._closing = False
        self._died = False
        self._callbacks: list[Callable[[Worker], None]] = []
        self._child = Child(str(spec), spec.threads, self._on_end)
        self._gives_way = spec.beside and give_way(self._child.pid)

    @classmethod
    def start(
        cls, spec: WorkerSpec, deadline_s: float, started: Callable[[Worker], None] | None = None
    ) -> Worker:
        """Starts a process and has it load the model.

        Args:
            spec: what to load.
            deadline_s: for all of it, seconds.
            started: given the worker before it has loaded anything: closing it makes the start fail.

        Raises:
            SluiceError: MODEL_LOAD_FAILED (the runtime refused the model, or the process died while loading
                it), OUT_OF_MEMORY (it was killed), RUNTIME_UNAVAILABLE, WORKER_TIMEOUT, WORKER_DIED (it died
                before it began to load) or IO_FAILED (no process could be started). No process is left
                behind.
        """
        worker = cls(spec)
        try:
            if started is not None:
                started(worker)
            worker._load(deadline_s)
        except BaseException:
            worker._closing = True
            worker._child.kill()
            worker.close(0)
            raise
        return worker

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def version(self) -> int:
        return self.spec.version

    @property
    def alive(self) -> bool:
        """Whether the process runs and takes requests."""
        return not self._child.ended and not self._closing

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def requests(self) -> int:
        """Clients' requests sent to the process: those before `checked` do not count."""
        return self._requests

    @property
    def failures(self) -> int:
        """Those of them that it did not answer, or whose inputs made the model fail."""
        return self._failures

    def succeed(self, dead: Worker) -> None:
        """Goes on with figures, policy and learned batch sizes of a worker of the same version."""
        self.figures, self.cache_s, self.shadow = dead.figures, dead.cache_s, dead.shadow
        self.cascade, self.versions = dead.cascade, dead.versions
        self.queue.inherit(dead.queue)

    def checked(self) -> None:
        """What it was asked so far, warm-up and golden inputs, was no client's: counts from here, and gives
        way to no other any more.
        """
        self._requests = self._failures = 0
        if self._gives_way:
            self._gives_way = False
            restore(self._child.pid)

    def resident_bytes(self) -> int:
        """Physical memory that the process uses; 0 when it has ended."""
        return self._child.resident_bytes()

    def on_death(self, callback: Callable[[Worker], None]) -> None:
        """Has `callback(worker)` called once when the process ends though nobody closed it.

        It runs in a thread of this worker, or at once in the caller's if the process is dead already. The
        same callback given twice counts once.
        """
        with self._state:
            if not self._died:
                if callback not in self._callbacks:
                    self._callbacks.append(callback)
                return
        callback(self)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """`close` waits, up to its deadline, for blocks under this manager."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Counts one user; the router does this under its own lock."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """Undoes one `enter`."""
        with self._lock:
            self._users -= 1
            if self._closing and not self._users:
                self._state.notify_all()

    def check(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The inputs in the model's order, as `run` takes them. Raises SluiceError(INPUT_INVALID)."""
        try:
            return check_inputs(self.inputs, inputs, any_batch=self._any_batch)
        except InputInvalid as error:
            raise self._input_invalid(error.message, error.hint) from error

    def infer(self, inputs: Mapping[str, NDArray[Any]], timeout_s: float) -> dict[str, NDArray[Any]]:
        """One inference past the queue: for checks of the worker itself.

        Args:
            inputs: an array for each of `self.inputs`, in its datatype and shape (see runtimes.Model.run).
            timeout_s: for waiting, running and answering, seconds.

        Returns:
            An array for each of `self.outputs`.

        Raises:
            SluiceError: as `check` and `run`.
        """
        with self.in_use():
            return self.run([self.check(inputs)], timeout_s)[0]

    def run(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]], timeout_s: float
    ) -> tuple[dict[str, NDArray[Any]], Timing]:
        """Runs inputs that `check` returned, joined along their first dimension if they are several.

        The caller counts itself as a user (`enter`, `in_use`).

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

    def stage(self, size: int) -> tuple[Staged, NDArray[np.uint8]] | None:
        """Room for a request's inputs where the process reads them, to be filled before `run`.

        Args:
            size: bytes, each input padded as a message lays them out.

        Returns:
            The inputs, none yet, and the room to be written to; the caller drops their place in the end. None
            when there is no room: inputs that are not staged are copied when they run.
        """
        staging = self._child.staging
        place = staging.take(size)
        if place is None:
            return None
        room = staging.arena.bytes[place.start : place.start + size]
        if room.size != size:  # the process ended, and its arena is closed
            place.drop()
            return None
        return Staged(place), room

    def samples(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """How many samples checked inputs hold: their first dimension where that is the batch, else 1."""
        if not self._any_batch and not self.takes_batches:
            return 1
        return int(next(iter(inputs.values())).shape[0])

    @property
    def takes_batches(self) -> bool:
        """Whether the first dimension of every input and output varies: requests may be put together."""
        specs = (*self.inputs, *self.outputs)
        return bool(self.inputs) and all(spec.shape[:1] == (-1,) for spec in specs)

    def busy_s(self) -> float:
        """For how long the running request has been running, seconds; 0 when none runs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self, drain_deadline_s: float) -> None:
        """Waits for the requests under way, then ends and reaps the process. Never raises; may be repeated.

        Args:
            drain_deadline_s: longest wait for requests; those still running then get WORKER_DIED, seconds.
        """
        with self._state:
            self._closing = True
            self._state.wait_for(lambda: self._users == 0, timeout=drain_deadline_s)
        self._child.end()

    # Starting.

    def _load(self, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        loading = False
        try:
            self._child.channel.receive(deadline_s)
            loading = True
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
                }
            )
            answer = self._child.channel.receive(deadline - time.monotonic())
        except TimeoutError:
            why = f"its worker did not load it within {deadline_s:g} s"
            raise self.timeout(why, "raise update.load_deadline_s, or ship a smaller model") from None
        except (ChannelClosed, ChannelBroken) as error:
            raise self._died_while_starting(loading, error) from error
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
        self._any_batch = splits_by_sample(self.inputs, self.outputs)
        self.ready_at = time.monotonic()

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
        if len(inputs) == 1 and isinstance(inputs[0], Staged):
            if not inputs[0].place.hold():
                raise self.timeout("the client no longer waits for the answer")
            self._reads = inputs[0].place
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
        self._requests += 1
        sent = time.monotonic()
        try:
            answer = self._child.channel.receive(deadline - sent)
        except TimeoutError:
            self._failures += 1
            self._give_up(began, timeout_s)
            raise self.timeout(f"no answer within {timeout_s:g} s") from None
        except (ChannelClosed, ChannelBroken) as error:
            self._failures += 1
            raise self._lost(error, delivered=True) from error
        self._idle()
        if answer.header.get("op") == "outputs":
            return answer.tensors, Timing(input_s=sent - began, infer_s=time.monotonic() - sent)
        self._failures += 1
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
        with self._state:
            self._died = not self._closing
            callbacks = self._callbacks if self._died else []
        if self._died:
            log.error("worker %s (process %d) %s", self.spec, self.pid, self._child.last_words())
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("a listener for the death of worker %s failed", self.spec)

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
