"""`sluice-agent doctor`: looks at everything that a box needs and says what to do about each fault.

Every check ends in a `Finding`: OK, FAULT, or ABSENT for what this box lacks and does not need, such as a
second runtime, and for what cannot be tried because of a fault before it. None changes anything, so they may
run beside a live agent. The order goes from the box outwards: configuration, clock, disk, store, runtimes,
agent, certificate, trust (doctor_trust.py), control plane, and what the operators signed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from agent import doctor_trust
from agent.admin import AdminClient
from agent.capabilities import agent_version
from agent.config import AgentConfig
from agent.control import Control
from agent.identity import BoxIdentity
from agent.status_table import count, size
from agent.trust import Source, open_client
from runtimes import survey
from updater.credentials import Credentials
from updater.digests import digest_file
from updater.errors import SluiceError
from updater.store import Store

# No box was installed before this program was written: an earlier clock is a wrong clock.
_EARLIEST = datetime(2025, 1, 1, tzinfo=timezone.utc)


OK, FAULT, ABSENT = "ok", "fault", "absent"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: OK, FAULT, or ABSENT, which also says that it was not tried.
        detail: what was found.
        hint: what helps; empty unless it is a fault.
        error: the fault, if it has a code.
    """

    check: str
    state: str
    detail: str
    hint: str = ""
    error: SluiceError | None = None


def examine(config: AgentConfig) -> Iterator[Finding]:
    """Runs the checks one by one."""
    yield Finding("configuration", state=OK, detail=f"device {config.device_id}, sluice {agent_version()}")
    checks: tuple[tuple[str, Callable[[AgentConfig], Finding]], ...] = (
        ("clock", _clock),
        ("state directory", _state_directory),
        ("disk", _disk),
        ("store", _store),
    )
    for name, check in checks:
        yield _guarded(name, lambda check=check: check(config))  # type: ignore[misc]
    yield from _runtimes(config)
    yield _guarded("agent", lambda: _agent(config))
    yield from _talk(config)


def _talk(config: AgentConfig) -> Iterator[Finding]:
    """What lies between this box and the control plane.

    What needs something that is at fault is not tried: it would say the same once more.
    """
    box = BoxIdentity(config)
    held = box.credentials
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("certificate", lambda: Finding("certificate", OK, doctor_trust.certificate(config, box)))
    ]
    if held.bundle and not config.control_certificate:
        address = config.enrolment_address
        checks.append(("enrolment", lambda: _handshake("enrolment", address, held.anonymous())))
    if held.chain:
        checks.append(("trust", lambda: _handshake("trust", config.control_address, held)))
    cause = ""
    for name, check in checks:
        found = _guarded(name, check)
        yield found
        if found.state == FAULT and name != "enrolment":
            cause = cause or name
    if cause:
        yield Finding("control plane", ABSENT, f"not tried: see {cause}")
    else:
        found = _guarded("control plane", lambda: _control(config, box))
        yield found
        cause = "control plane" if found.state == FAULT else ""
    if config.trust_root is None:
        hint = "put the file of `sluice trust root` on this box and name it as trust.root"
        yield Finding("signatures", FAULT, "no root is pinned: this box installs nothing", hint)
    elif not config.trust_root.is_file() or not cause:
        yield _guarded("signatures", lambda: _signatures(config, box))
    else:
        yield Finding("signatures", ABSENT, f"not tried: see {cause}")


def _handshake(name: str, address: str, shown: Credentials) -> Finding:
    return Finding(name, OK, doctor_trust.handshake(address, shown))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except SluiceError as error:
        return Finding(name, state=FAULT, detail=error.message, hint=error.hint, error=error)
    except OSError as error:
        return Finding(name, state=FAULT, detail=str(error), hint="check the path and its permissions")


def _clock(config: AgentConfig) -> Finding:
    del config
    now = datetime.now(timezone.utc)
    text = now.strftime("%Y-%m-%d %H:%M:%S UTC")
    if now < _EARLIEST:
        return Finding(
            "clock",
            state=FAULT,
            detail=text,
            hint="set it, or let systemd-timesyncd; serving works regardless",
        )
    return Finding("clock", state=OK, detail=text)


def _state_directory(config: AgentConfig) -> Finding:
    directory = config.state_dir
    if not directory.is_dir():
        return Finding(
            "state directory",
            state=FAULT,
            detail=f"{directory} does not exist",
            hint="start the agent once: it makes it (`systemctl start sluice-agent`)",
        )
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            "state directory",
            state=FAULT,
            detail=f"{directory} cannot be written by this user",
            hint=f"run as the agent's user, or `chown -R sluice {directory}`",
        )
    return Finding("state directory", state=OK, detail=f"{directory} is writable")


def _disk(config: AgentConfig) -> Finding:
    place = _existing(config.state_dir)
    free = shutil.disk_usage(place).free
    detail = f"{size(free)} free at {place}, {size(config.reserve_bytes)} of it reserved"
    if free <= config.reserve_bytes:
        return Finding("disk", state=FAULT, detail=detail, hint="free space there, or no update can begin")
    return Finding("disk", state=OK, detail=detail)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _store(config: AgentConfig) -> Finding:
    root = config.state_dir / "store"
    if not root.is_dir():
        return Finding("store", state=OK, detail="empty")
    store = Store(root)
    digests = list(store.digests())
    damaged = [digest for digest in digests if digest_file(store.path(digest)) != digest]
    if damaged:
        return Finding(
            "store",
            state=FAULT,
            detail=f"{len(damaged)} of {len(digests)} files are damaged, the first is {damaged[0]}",
            hint="check the disk or SD card; restart the agent, which fetches what it needs again",
        )
    return Finding(
        "store",
        state=OK,
        detail=f"{count(len(digests), 'file', 'files')}, {size(store.size_bytes())}, all sound",
    )


def _runtimes(config: AgentConfig) -> Iterator[Finding]:
    probes = survey.survey(delegates=config.delegates)
    allowed = [probe for probe in probes if not config.runtimes or probe.runtime in config.runtimes]
    for probe in allowed:
        if probe.usable:
            detail = f"{probe.version} reads {', '.join(probe.formats)} on {', '.join(probe.accelerators)}"
            yield Finding(f"runtime {probe.runtime}", state=OK, detail=detail)
            for reason in probe.passed_over:
                yield Finding(
                    f"delegates of {probe.runtime}",
                    FAULT,
                    reason,
                    hint="mend or remove what inference.delegates names",
                )
        else:
            # One that is simply not installed is no fault while another works.
            needed = not any(other.usable for other in allowed) or probe.runtime in config.runtimes
            yield Finding(
                f"runtime {probe.runtime}",
                FAULT if needed else ABSENT,
                probe.error,
                hint=(probe.hint or "install it into the agent's environment again") if needed else "",
            )


def _agent(config: AgentConfig) -> Finding:
    client = AdminClient(config.admin_socket)
    try:
        status = client.status()
    finally:
        client.close()
    served = ", ".join(
        f"{item.model}@{item.active_version}" for item in status.reported.models if item.healthy
    )
    down = [item.model for item in status.reported.models if item.active_version and not item.healthy]
    detail = f"process {status.process_id} serves {served or 'nothing yet'}"
    if down:
        return Finding("agent", state=FAULT, detail=f"{detail}; down: {', '.join(down)}", hint="see its log")
    return Finding("agent", state=OK, detail=detail)


def _control(config: AgentConfig, box: BoxIdentity) -> Finding:
    control = Control(config.control_address, box)
    try:
        known = control.check(config.device_id)
    finally:
        control.close()
    detail = f"{config.control_address} answers" + ("" if known else " and does not know this device yet")
    return Finding("control plane", state=OK, detail=detail)


def _signatures(config: AgentConfig, box: BoxIdentity) -> Finding:
    """Walks the chain from the pinned root in a directory of its own, as a new box does."""
    assert config.trust_root is not None
    control = Control(config.control_address, box)
    try:
        with tempfile.TemporaryDirectory() as directory:
            source = Source(control)
            client = open_client(config.trust_root, Path(directory), source)
            source.begin()
            client.refresh()
    finally:
        control.close()
    detail = f"from {config.trust_root} to root version {client.root.version}, everything is signed and fresh"
    return Finding("signatures", state=OK, detail=detail)
