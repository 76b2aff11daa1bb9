"""What a queue (batching.py) deals with: what runs batches, kinds of requests, the gate, refusals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from agent.figures import Figures, Timing
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

Arrays = dict[str, NDArray[Any]]


class Overloaded(SluiceError):
    """LIMIT_EXCEEDED: the request was turned away; it may be worth trying again after `retry_s` seconds."""

    def __init__(self, message: str, *, obj: str, retry_s: float) -> None:
        hint = f"try again after {math.ceil(retry_s * 1000)} ms, or send fewer requests at a time"
        super().__init__(errors_pb2.LIMIT_EXCEEDED, message, hint=hint, obj=obj)
        self.retry_s = retry_s


class Runner(Protocol):
    """What runs batches: a process."""

    figures: Figures

    @property
    def ended(self) -> bool:
        """Whether it runs nothing any more."""

    def run(self, inputs: Sequence[Mapping[str, NDArray[Any]]], timeout_s: float) -> tuple[Arrays, Timing]:
        """Runs checked inputs, joined along the first dimension if they are several. Raises SluiceError."""

    def busy_s(self) -> float:
        """For how long the running request has been running, seconds; 0: none runs."""

    def timeout(self, why: str) -> SluiceError:
        """The error for a request that waited too long."""


class Kind(NamedTuple):
    """What decides which requests may go together.

    Attributes:
        key: equal ones may share a batch; None: it goes alone.
        samples: that the request holds.
        elements: of one of them.
    """

    key: Hashable
    samples: int
    elements: int


def kind_of(inputs: Mapping[str, NDArray[Any]]) -> Kind:
    """The kind of a request with these inputs, for a model that takes batches."""
    arrays = inputs.values()
    first = next(iter(arrays))
    if not first.ndim or any(array.shape[:1] != first.shape[:1] for array in arrays):
        return Kind(None, 1, 1)  # the model will say what it thinks of that, to this request alone
    samples = first.shape[0]
    return Kind(
        tuple([array.shape[1:] for array in arrays]), samples, sum(array.size for array in arrays) // samples
    )


class Gate(Protocol):
    """What low-priority work waits for: host_load.HostLoad."""

    def admits(self) -> bool:
        """Whether it may begin."""

    def low_work(self, threads: int) -> AbstractContextManager[None]:
        """Around a run of it with so many threads."""
