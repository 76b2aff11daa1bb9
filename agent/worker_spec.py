"""What a worker is to load and how, and how its process can let its callers down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.limits import HANG_S
from runtimes.interface import CPU, OPTIMIZATIONS, ExternalDelegate
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is to load and how.

    Attributes:
        model: the model's name.
        version: its version.
        path: the model file, verified by the caller.
        format: "onnx" or "tflite".
        runtime_preference: the runtime to take if several read the format; empty for any.
        threads: that one inference may use.
        accelerators: what to run on, best first; the first that works is taken.
        optimization: of an ONNX graph, see runtimes.interface.
        xnnpack: whether TensorFlow Lite may use XNNPACK.
        delegates: the box's external delegates that `accelerators` may name.
        loaded_digests: of the files that this worker has loaded, for reports.
        instances: processes that hold it, each with one inference at a time.
        hang_s: a request that runs longer gets the process killed, seconds.
        beside: another version serves meanwhile, so that it gives way until it is `checked`.
    """

    model: str
    version: int
    path: Path
    format: str
    runtime_preference: str = ""
    threads: int = 1
    accelerators: tuple[str, ...] = (CPU,)
    optimization: str = OPTIMIZATIONS[-1]
    xnnpack: bool = True
    delegates: tuple[ExternalDelegate, ...] = ()
    loaded_digests: tuple[str, ...] = field(default=())
    instances: int = 1
    hang_s: float = HANG_S
    beside: bool = False

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"


class WorkerDied(SluiceError):
    """WORKER_DIED. `delivered`: the request may have reached the process; if not, another may take it.

    `killed`: the process was killed by someone or by the kernel, so the model need not be at fault.
    """

    def __init__(self, message: str, *, obj: str, delivered: bool, killed: bool = False) -> None:
        super().__init__(
            errors_pb2.WORKER_DIED, message, hint="the agent starts it again; repeat the request", obj=obj
        )
        self.delivered = delivered
        self.killed = killed


class LoadCrashed(SluiceError):
    """MODEL_LOAD_FAILED: the process ended by itself while it loaded the model."""
