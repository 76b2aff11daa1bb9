"""The serving half of an agent in this process: real slots, store, workers, front; no control plane.

For tests and benchmarks of what happens between "a version is whole on disk" and "it answers": versions are
put into the store by hand, then activated as the reconciler does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from agent import chooser, swap_options
from agent.activation import Activator
from agent.config import AgentConfig
from agent.control import CancelledError, Control
from agent.inference import InferenceServer
from agent.installer import Installer, Prepared
from agent.router import Router
from agent.slots import Installed
from agent.state import State, Update
from agent.supervisor import Supervisor
from agent.swapping import Seen
from agent.trust import Gate
from edge_tests.harness.serving import eventually
from edge_tests.harness.trust import BoxChannels
from sluice.api.v1 import sync_pb2
from updater.errors import SluiceError
from updater.manifest import File, Manifest, Variant
from updater.store import Store

CLOSE_S = 20.0
NOWHERE = "127.0.0.1:1"  # nothing here asks the control plane


class LocalBox:
    """One box; `with` closes its workers and its front.

    Args:
        directory: for its state.
        settings: fields of AgentConfig.
        serve: whether the inference front listens.
    """

    def __init__(self, directory: Path, *, serve: bool = True, **settings: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {
            "soak_s": 0.3,
            "load_deadline_s": 30.0,
            "memory_reserve_bytes": 0,
            **settings,
        }
        config = AgentConfig(control_address=NOWHERE, device_id="box", state_dir=directory, **fields)
        self.store = Store(directory / "store")
        (directory / "slots").mkdir(exist_ok=True)
        self.state = State(directory / "state.db")
        self.router = Router()
        self._installer = Installer(
            self.store,
            directory / "slots",
            Control(NOWHERE, BoxChannels()),
            Gate(config, self.state, BoxChannels()),
            device_id="box",
            box=lambda: chooser.Box("", "", 0, 0, ()),
            reserve_bytes=0,
            make_room=lambda: None,
        )
        self.activator = Activator(
            self.state,
            self.store,
            self._installer,
            self.router,
            threads=1,
            terms=lambda options: swap_options.read(options, config),
            load_deadline_s=config.load_deadline_s,
            changed=lambda: None,
        )
        self.ended: dict[str, SluiceError | CancelledError | None] = {}
        self.steps: list[str] = []
        self.activator.on_end(self.ended.__setitem__)
        self.supervisor = Supervisor(self.router, self.activator.crash_looped)
        self.server = InferenceServer(self.router, "127.0.0.1:0") if serve else None
        if self.server is not None:
            self.server.start()

    @property
    def address(self) -> str:
        assert self.server is not None
        return self.server.addresses[0]

    def install(
        self,
        version: int,
        path: Path,
        *,
        model: str = "tiny",
        golden: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Prepared:
        """Puts a version on disk, as an installation leaves it."""
        files = [(path, "model")] + ([(golden, "golden")] if golden is not None else [])
        variant = Variant(
            name="only",
            format=path.suffix.removeprefix("."),
            files=tuple(
                File(source.name, role, self.store.add_file(source), source.stat().st_size)
                for source, role in files
            ),
            options=dict(options or {}),
        )
        data = Manifest(model, version, (variant,)).to_bytes()
        return self._installer.prepare(Installed(version, self.store.add_bytes(data), "only", ""), model)

    def activate(self, prepared: Prepared) -> bool:
        """Stages and activates it in this thread; see `Activator.activate`."""
        model, installed = prepared.manifest.model, prepared.installed
        self.activator.stage(prepared, model)
        self.steps.clear()
        update = Update(model, installed.version, installed.manifest_digest)
        return self.activator.activate(model, prepared, update, self._note)

    def serve(self, version: int, path: Path, **more: Any) -> Prepared:
        """Installs and activates a version and waits until its soak has ended."""
        prepared = self.install(version, path, **more)
        assert self.activate(prepared)
        eventually(lambda: not self.state.slots(prepared.manifest.model).soaking, "the soak ended")
        return prepared

    def in_thread(self, prepared: Prepared) -> Attempt:
        """The same as `activate` in a thread."""
        return Attempt(lambda: self.activate(prepared))

    def swap(self, model: str = "tiny") -> Seen:
        """The only swap of the model under way."""
        (seen,) = [seen for seen in self.under_way() if seen.swap.plan.model == model]
        return seen

    def under_way(self) -> list[Seen]:
        """The swaps that have not ended."""
        return [seen for seen in self.activator.swaps() if not seen.swap.ended]

    def answers(self, model: str = "tiny") -> int:
        """The version whose worker answers, and lives."""
        serving = self.router.serving(model)
        return serving.active.version if serving is not None and serving.ready else 0

    def _note(self, step: sync_pb2.UpdateStep.ValueType) -> None:
        self.steps.append(sync_pb2.UpdateStep.Name(step).removeprefix("UPDATE_STEP_").lower())

    def close(self) -> None:
        self.supervisor.stop(CLOSE_S)
        if self.server is not None:
            self.server.stop(1)
        self.activator.close(CLOSE_S)
        self.state.close()

    def __enter__(self) -> LocalBox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Attempt:
    """A call in a thread of its own, and what it came to."""

    def __init__(self, call: Callable[[], bool]) -> None:
        self.result: bool | None = None
        self.error: Exception | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def join(self) -> Attempt:
        self._thread.join(CLOSE_S * 2)
        assert not self._thread.is_alive()
        return self
