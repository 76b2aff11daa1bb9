"""The agent, put together: started, watched and stopped in one place.

Start: lock the state directory -> open the state -> local socket -> load every model from disk -> inference
front (at the latest after BOOT_BEFORE_SERVING_S, so that one slow model does not hold up the others) -> tell
systemd READY -> only then probe the runtimes, sync, update and measure. Serving never waits for the network
and never needs the control plane.

The main thread then only waits for a signal and feeds the watchdog, and that only while the threads that
matter make headway. Stop: no new work, telemetry and sync end, requests under way finish, workers are closed
and reaped; all within STOP_S.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent import placement, swap_options
from agent import update_limits as limits
from agent.activation import Activator
from agent.admin import AdminServer
from agent.capabilities import agent_version, hello, probe_box
from agent.chooser import Box
from agent.config import AgentConfig
from agent.control import Control
from agent.held_versions import HeldVersions
from agent.host_load import HostLoad
from agent.identity import BoxIdentity
from agent.inference import InferenceServer
from agent.installer import Installer
from agent.limits import MAX_LOCAL_CONNECTIONS
from agent.local_socket import LocalSocket
from agent.lock import StateLock
from agent.memory import available_bytes
from agent.metrics import MetricsServer
from agent.notify import notify, watchdog_interval_s
from agent.outbox import Outbox
from agent.peer_credentials import group_id
from agent.reconciler import Reconciler
from agent.recovery import recover
from agent.renewing import Renewer
from agent.reporter import Progress, compose
from agent.repository import Repository
from agent.retention import collect, versions_on_disk
from agent.router import Router
from agent.state import State
from agent.supervisor import LoopRule, Supervisor
from agent.swap_status import swap_status
from agent.sync import Sync
from agent.telemetry import Telemetry, WorkerFigures
from agent.trust import Gate
from agent.version_directory import installed_in, sweep
from sluice.api.v1 import admin_pb2, errors_pb2, sync_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError, os_errors
from updater.store import Store

if TYPE_CHECKING:
    from agent.tracing import Tracing

log = logging.getLogger(__name__)
INFERENCE_ADDRESS_FILE = "inference-address"
PRIVATE_DIRECTORY = "sockets"  # of the state directory: what unix sockets relay to


class Daemon:
    """Everything that runs in the agent's process.

    Args:
        config: checked.

    Raises SluiceError(STATE_LOCKED | IO_FAILED | DISK_FULL) when it cannot start.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._started_s = time.monotonic()
        self._stopping = threading.Event()
        self._refusal = ""  # why the last desired state was not believed
        self._undo = ExitStack()
        try:
            self._build()
        except BaseException:
            self._undo.close()
            raise

    def _build(self) -> None:
        config, state_dir = self._config, self._config.state_dir
        slots_dir = state_dir / "slots"
        with os_errors("creating the state directory", state_dir):
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
            slots_dir.mkdir(exist_ok=True)
        self._undo.enter_context(StateLock(state_dir))
        self._slots_dir = slots_dir
        self._store = Store(state_dir / "store")
        sweep(slots_dir, self._store)
        self._state = State(state_dir / "state.db")
        self._undo.callback(self._state.close)
        if self._state.set_aside is not None:
            log.error("the state database was damaged; it lies in %s now", self._state.set_aside)
            for slots in recover(self._store, slots_dir):
                self._state.save(slots)
        self._outbox = Outbox(state_dir / "outbox.db", config.outbox_max_bytes)
        self._undo.callback(self._outbox.close)
        if self._outbox.replaced:
            log.warning("the telemetry outbox was damaged and begins anew")
        self._router = Router()
        self._progress = Progress(self._changed)
        self._identity = BoxIdentity(config)
        control = Control(config.control_address, self._identity)
        self._gate = Gate(config, self._state, self._identity)
        self._undo.callback(self._gate.close)
        self._box = Box("", "", 0, 0, ())  # until probed; nothing is installed before that
        self._installer = Installer(
            self._store,
            slots_dir,
            control,
            self._gate,
            device_id=config.device_id,
            box=lambda: self._box,
            reserve_bytes=config.reserve_bytes,
            make_room=lambda: self._collect(spare=False),
        )
        self._loop_rule = LoopRule(config.crash_loop_deaths, config.crash_loop_window_s)
        self._load = HostLoad(config.low_hold_load, config.low_spare_load)
        self._activator = Activator(
            self._state,
            self._store,
            self._installer,
            self._router,
            threads=config.threads,
            terms=lambda options: swap_options.read(options, config),
            load_deadline_s=config.load_deadline_s,
            changed=self._changed,
            gate=self._load,
            process_bytes=config.process_bytes,
            delegates=config.delegates,
        )
        self._renewer = Renewer(self._router, self._activator.outgrew)
        self._held = HeldVersions(
            self._router,
            on_disk=lambda: versions_on_disk(slots_dir),
            installed=lambda model, version: installed_in(slots_dir, model, version),
            bring_up=self._activator.bring_up,
            instances=self._activator.instances,
            available_bytes=available_bytes,
            rule=self._loop_rule,
        )
        self._reconciler = Reconciler(
            self._state,
            self._installer,
            self._activator,
            control,
            self._progress,
            collect=lambda tight: self._collect(spare=not tight),
            serving=lambda model: self._router.serving(model) is not None or self._activator.unloaded(model),
            free_bytes=lambda: shutil.disk_usage(state_dir).free,
            changed=self._changed,
        )
        self._telemetry = Telemetry(
            Control(config.control_address, self._identity),
            config.device_id,
            self._outbox,
            state_dir,
            self._figures,
            config.telemetry_interval_s,
        )
        self._sync = Sync(
            config.control_address,
            identity=self._identity,
            device_id=config.device_id,
            hello=lambda: hello(config, self._box, self._reconciler.desired.generation),
            reported=self.reported,
            on_desired=self._desired,
            on_connected=self._connected,
            poll_interval_s=config.poll_interval_s,
            reconnect_max_s=config.reconnect_max_s,
        )
        self._identity.on_renewed = self._sync.renewed
        private = state_dir / PRIVATE_DIRECTORY
        self._tracing = _tracing(config)
        self._inference = InferenceServer(
            self._router,
            [config.inference_address] if config.inference_address else [],
            repository=Repository(self._router, self._activator, control=config.model_control),
            local=inference_socket(config, private),
            tracing=self._tracing,
            cache_bytes=config.cache_bytes,
        )
        self._metrics = MetricsServer(self._router, config.metrics_address)
        self._admin = AdminServer(
            config.admin_socket,
            private,
            group_id(config.admin_group, "admin.group") if config.admin_group else None,
            self.status,
            lambda model: self._activator.revert(model, pin=True),
        )

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT. Raises SluiceError when it cannot start."""
        with self._undo, _signals(self._stopping):
            try:
                self._start()
                log.info(
                    "ready: device %s, control plane %s", self._config.device_id, self._config.control_address
                )
                self._watch()
            finally:
                notify("STOPPING=1")
                log.info("stopping")
                self._stop()

    def _start(self) -> None:
        self._admin.start()
        self._supervisor = Supervisor(
            self._router, self._activator.crash_looped, rule=self._loop_rule, start=placement.start
        )
        self._renewer.start()
        boot = threading.Thread(target=self._boot, name="boot", daemon=True)
        boot.start()
        boot.join(limits.BOOT_BEFORE_SERVING_S)
        self._inference.start()
        if self._config.metrics_address:
            self._metrics.start()
        write_atomic(
            self._config.state_dir / INFERENCE_ADDRESS_FILE, (self._inference.addresses[0] + "\n").encode()
        )
        while boot.is_alive() and not self._stopping.is_set():
            boot.join(limits.CANCEL_CHECK_S)
        if self._stopping.is_set():
            return  # a worker that is still loading ends with this process
        notify("READY=1", f"STATUS={self._summary()}")
        if self._config.trust_root is None:
            log.warning("no root is pinned (trust.root): no version can be installed")
        elif not self._config.trust_root.is_file():
            log.warning(
                "trust.root: there is no file %s: no version can be installed", self._config.trust_root
            )
        self._box = probe_box(self._config.runtimes, self._config.delegates)
        self._identity.start()
        self._held.start()
        self._reconciler.start()
        self._sync.start()
        self._telemetry.start()

    def _boot(self) -> None:
        for model in self._state.models():
            if self._stopping.is_set():
                return
            try:
                self._activator.boot(model)
            except Exception:
                log.exception("a defect while starting %s; other models go on", model)

    def _watch(self) -> None:
        """The main thread's work: wait for the end, feed the watchdog."""
        interval_s = watchdog_interval_s()
        fed_s = 0.0
        told = ""
        while not self._stopping.wait(limits.WATCHDOG_TICK_S):
            self._load.tick()
            summary = self._summary()
            if summary != told:
                notify(f"STATUS={summary}")
                told = summary
            dead = [
                name
                for name, part in (
                    ("identity", self._identity),
                    ("sync", self._sync),
                    ("reconciler", self._reconciler),
                    ("telemetry", self._telemetry),
                )
                if not part.alive()
            ]
            if dead:
                log.error("no sign of life from: %s; the watchdog is not fed", ", ".join(dead))
            elif interval_s is not None and time.monotonic() - fed_s >= interval_s / 2:
                notify("WATCHDOG=1")
                fed_s = time.monotonic()

    def _stop(self) -> None:
        """Ends everything, what depends on others first."""
        until = time.monotonic() + limits.STOP_S

        def left_s() -> float:
            return max(0.5, until - time.monotonic())

        for part in (
            self._identity,
            self._reconciler,
            self._held,
            self._renewer,
            self._sync,
            self._telemetry,
        ):
            part.stop(min(left_s(), 5.0))
        if hasattr(self, "_supervisor"):
            self._supervisor.stop(1.0)
        self._inference.stop(min(left_s(), 5.0))
        self._metrics.stop()
        self._activator.close(left_s())
        if self._tracing is not None:
            self._tracing.close()
        self._admin.stop(0.5)

    def _changed(self) -> None:
        if hasattr(self, "_sync"):
            self._held.changed()
            self._sync.changed()

    def _desired(self, message: sync_pb2.DesiredState) -> None:
        """A desired state came: taken up if it is proven, else told and forgotten."""
        try:
            self._reconciler.take(self._gate.admit(message))
        except SluiceError as error:
            log.warning("a desired state was refused: %s", error)
            self._refusal = f"a desired state was refused: {error}"
        else:
            self._refusal = ""

    def _connected(self) -> None:
        self._reconciler.connected()
        self._telemetry.connected()

    def _collect(self, *, spare: bool) -> None:
        """Removes what no slot and no desired version needs, with `spare` keeping a few versions more."""
        desired = [item.manifest_digest for item in self._reconciler.desired.models.values()]
        keep = self._config.keep_versions if spare else 0
        pinned = self._held.pinned()
        freed = collect(self._store, self._slots_dir, self._state.models(), desired, keep, pinned)
        if freed:
            log.info("freed %d bytes in the store", freed)

    def reported(self) -> sync_pb2.ReportedState:
        """The state as it is now, see reporter.py."""
        return compose(
            self._reconciler.desired,
            self._state.models(),
            self._reconciler.updates(),
            self._progress.all(),
            self._activator.loaded(),
            time.time(),
        )

    def _figures(self) -> list[WorkerFigures]:
        return [
            WorkerFigures(
                model=serving.model,
                version=worker.version,
                role=serving.place(worker),
                instance=number,
                process_id=instance.pid,
                runtime=worker.runtime,
                resident_bytes=instance.resident_bytes(),
                requests=instance.requests,
                failures=instance.failures,
                private_bytes=instance.private_bytes(),
                memory_limit_bytes=worker.memory_limit,
                renewals=worker.renewals,
            )
            for serving in self._router.models()
            for worker in serving.workers
            for number, instance in enumerate(worker.instances)
        ]

    def status(self) -> admin_pb2.GetStatusResponse:
        """What `sluice-agent status` shows."""
        desired = self._reconciler.desired
        return admin_pb2.GetStatusResponse(
            device_id=self._config.device_id,
            agent_version=agent_version(),
            process_id=os.getpid(),
            uptime_s=int(time.monotonic() - self._started_s),
            control_address=self._config.control_address,
            control_connected=self._sync.connected,
            control_error=self._sync.error or self._refusal,
            inference_address=self._inference.addresses[0] if self._inference.addresses else "",
            reported=self.reported(),
            desired=sync_pb2.DesiredState(
                generation=desired.generation,
                models=[
                    sync_pb2.DesiredModel(
                        model=item.model,
                        version=item.version,
                        manifest_digest=item.manifest_digest,
                        rollout_id=item.rollout_id,
                    )
                    for item in desired.models.values()
                ],
            ),
            store_bytes=self._store.size_bytes(),
            disk_free_bytes=shutil.disk_usage(self._config.state_dir).free,
            outbox_batches=self._outbox.count(),
            swaps=[swap_status(seen) for seen in self._activator.swaps()],
            workers=[
                admin_pb2.WorkerStatus(
                    model=item.model,
                    version=item.version,
                    process_id=item.process_id,
                    runtime=item.runtime,
                    role=item.role,
                    resident_bytes=item.resident_bytes,
                    requests=item.requests,
                    failures=item.failures,
                    private_bytes=item.private_bytes,
                    memory_limit_bytes=item.memory_limit_bytes,
                    renewals=item.renewals,
                )
                for item in self._figures()
            ],
        )

    def _summary(self) -> str:
        """One line for `systemctl status`."""
        served = ", ".join(
            f"{serving.model}@{serving.active.version}{'' if serving.ready else ' (down)'}"
            for serving in self._router.models()
        )
        link = "connected" if self._sync.connected else "control plane away"
        return f"serving {served or 'nothing yet'}; {link}"


def inference_socket(config: AgentConfig, private: Path) -> LocalSocket | None:
    """The unix socket that serves inference to root, the agent's own user and one group; None without one."""
    if config.inference_socket is None:
        return None
    named = config.inference_group
    group = group_id(named, "inference.group") if named else os.getegid()
    return LocalSocket(
        config.inference_socket,
        private,
        "inference",
        group=group,
        allow=lambda caller: caller.may(os.geteuid(), group),
        most=MAX_LOCAL_CONNECTIONS,
    )


def _tracing(config: AgentConfig) -> Tracing | None:
    """Only with an endpoint: what it imports takes memory that a box without it keeps."""
    if not config.tracing_endpoint:
        return None
    try:
        from agent.tracing import Tracing
    except ImportError as error:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"tracing.endpoint is set and OpenTelemetry cannot be imported: {error}",
            hint="pip install 'sluice[tracing]', or take tracing.endpoint out",
            obj="tracing.endpoint",
        ) from error
    return Tracing(
        config.tracing_endpoint,
        device_id=config.device_id,
        sample_ratio=config.tracing_sample_ratio,
        attributes=config.tracing_attributes,
    )


@contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event while the block runs."""
    before = {
        number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(config: AgentConfig) -> None:
    """Runs an agent in this process until it is told to stop. Raises SluiceError when it cannot start."""
    try:
        Daemon(config).run()
    except SluiceError as error:
        notify(f"STATUS={error}")
        raise
