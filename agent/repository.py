"""The models a box holds, as Triton's repository calls see them: list, load, unload.

What a box holds and which version is active is decided by rollouts; a client can only end a model's workers
and start them again, and only where the agent's configuration allows it, because the inference port asks
nobody who they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.limits import MAX_NAME_CHARACTERS
from agent.router import Router
from inference import open_inference_pb2 as pb
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"


@dataclass(frozen=True)
class Held:
    """A version whose files lie on this box."""

    model: str
    version: int


class Holder(Protocol):
    """Who knows the versions on disk and starts and ends their workers."""

    def held(self) -> Sequence[Held]:
        """Every model's active and previous version."""

    def load(self, model: str) -> None:
        """Serves the active version; no effect if it is served. Raises SluiceError."""

    def unload(self, model: str) -> None:
        """Ends the model's workers and keeps its files. Raises SluiceError(MODEL_UNKNOWN)."""


class Repository:
    """The three calls over a router and, on a whole agent, a holder of versions on disk.

    Args:
        router: what is loaded.
        holder: what lies on disk; None: only what is loaded is known.
        control: whether clients may load and unload.
    """

    def __init__(self, router: Router, holder: Holder | None = None, *, control: bool = False) -> None:
        self._router = router
        self._holder = holder
        self._control = control

    def index(self, *, ready: bool) -> pb.RepositoryIndexResponse:
        """Every version, or those that can answer."""
        found: dict[tuple[str, int], tuple[str, str]] = {}
        if self._holder is not None and not ready:
            found = {(item.model, item.version): (UNAVAILABLE, "not loaded") for item in self._holder.held()}
        for serving in self._router.models():
            for worker in serving.workers:
                key = (worker.model, worker.version)
                if worker.alive:
                    found[key] = (READY, "")
                elif not ready:
                    restarts = worker is serving.active
                    found[key] = (LOADING if restarts else UNAVAILABLE, "its worker died")
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=model, version=str(version), state=state, reason=reason
                )
                for (model, version), (state, reason) in sorted(found.items())
            ]
        )

    def load(self, request: pb.RepositoryModelLoadRequest) -> None:
        """Serves a model that was unloaded. Raises SluiceError(REQUEST_INVALID | MODEL_UNKNOWN | ...)."""
        holder = self._controlled()
        if request.parameters:
            raise _refused(
                f"parameters {sorted(request.parameters)[:3]} would change what is served",
                "load without parameters; a rollout says which version and how",
            )
        holder.load(_name(request.model_name))

    def unload(self, request: pb.RepositoryModelUnloadRequest) -> None:
        """Ends a model's workers. Raises SluiceError(REQUEST_INVALID | MODEL_UNKNOWN)."""
        self._controlled().unload(_name(request.model_name))

    def _controlled(self) -> Holder:
        if self._holder is None or not self._control:
            raise _refused(
                "clients may not load or unload models on this box",
                "set inference.model_control = true in the agent's configuration",
            )
        return self._holder


def _name(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise SluiceError(
            errors_pb2.MODEL_UNKNOWN, f"a model's name has 1 to {MAX_NAME_CHARACTERS} characters"
        )
    return name


def _refused(why: str, hint: str) -> SluiceError:
    return SluiceError(errors_pb2.REQUEST_INVALID, why, hint=hint)
