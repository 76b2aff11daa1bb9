"""The agent's configuration: one TOML file, read once at start, checked whole before anything else runs.

Every key has its type, unit, default and range in `KEYS`; docs/agent-config.md describes the same keys for
people, and a test holds the two together. A key that is unknown, of the wrong type or out of range is
refused by name with what is allowed: a typo must not silently leave a box on a default.
"""

from __future__ import annotations

import difflib
import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from agent.limits import (
    CACHE_BYTES,
    CRASH_LOOP_DEATHS,
    CRASH_LOOP_WINDOW_S,
    HOLD_LOAD,
    LATEST_REQUESTS,
    MAX_CRASH_LOOP_DEATHS,
    MAX_PROVIDERS,
    SPARE_LOAD,
)
from runtimes.interface import CPU, ExternalDelegate
from sluice.api.v1 import errors_pb2
from updater.addresses import next_port
from updater.errors import SluiceError

MAX_CONFIG_BYTES = 64 << 10
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 128
MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un holds 108 with the closing zero
RUNTIMES = ("onnxruntime", "litert", "tflite-runtime")
KEEP = ("warm", "disk")  # the previous version during the soak: its worker, or its files alone
MEMORY_SHORT = ("refuse", "stop-then-start")  # where two workers do not fit
DEFAULT_PATH = Path("/etc/sluice/agent.toml")

_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE_ID_RULE = "1 to 64 of a-z A-Z 0-9 - _ . starting with a letter or digit"
_DELEGATE = re.compile(r"[a-z][a-z0-9_]{0,31}")
_MACHINE_ID = Path("/etc/machine-id")
_SYSTEMD_RUN_DIRECTORY = Path("/run/sluice")


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        name: with its table: "update.soak_s".
        field: of AgentConfig.
        kind: text, path, address, endpoint (address or https://address), listen, number, integer, flag,
            choice, texts (a table of texts), runtimes or delegates (a table of them by name).
        least: smallest number allowed, in the unit that the name ends with.
        most: largest number allowed.
        choices: what a choice may be.
    """

    name: str
    field: str
    kind: str
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()


KEYS = (
    Key("device_id", "device_id", "device_id"),
    Key("state_dir", "state_dir", "path"),
    Key("labels", "labels", "texts"),
    Key("control.address", "control_address", "address"),
    Key("control.enrolment_address", "enrolment_address", "address"),
    Key("control.bundle", "control_bundle", "path"),
    Key("control.token", "control_token", "text"),
    Key("control.certificate", "control_certificate", "path"),
    Key("control.key", "control_key", "path"),
    Key("control.server_name", "control_server_name", "text"),
    Key("control.poll_interval_s", "poll_interval_s", "number", 1, 86_400),
    Key("control.reconnect_max_s", "reconnect_max_s", "number", 0.1, 3_600),
    Key("inference.address", "inference_address", "listen"),
    Key("inference.socket", "inference_socket", "path"),
    Key("inference.group", "inference_group", "text"),
    Key("inference.threads", "threads", "integer", 1, 256),
    Key("inference.low_hold_load", "low_hold_load", "number", 0, 1),
    Key("inference.low_spare_load", "low_spare_load", "number", 0, 1),
    Key("inference.process_memory_bytes", "process_bytes", "integer", 0, 1 << 40),
    Key("inference.cache_bytes", "cache_bytes", "integer", 0, 1 << 40),
    Key("inference.crash_loop_deaths", "crash_loop_deaths", "integer", 2, MAX_CRASH_LOOP_DEATHS),
    Key("inference.crash_loop_window_s", "crash_loop_window_s", "number", 1, 86_400),
    Key("inference.runtimes", "runtimes", "runtimes"),
    Key("inference.delegates", "delegates", "delegates"),
    Key("inference.model_control", "model_control", "flag"),
    Key("admin.socket", "admin_socket", "path"),
    Key("admin.group", "admin_group", "text"),
    Key("metrics.address", "metrics_address", "listen"),
    Key("tracing.endpoint", "tracing_endpoint", "endpoint"),
    Key("tracing.sample_ratio", "tracing_sample_ratio", "number", 0, 1),
    Key("tracing.attributes", "tracing_attributes", "texts"),
    Key("telemetry.interval_s", "telemetry_interval_s", "number", 0.2, 86_400),
    Key("telemetry.outbox_max_bytes", "outbox_max_bytes", "integer", 65_536, 1 << 30),
    Key("trust.root", "trust_root", "path"),
    Key("update.keep_versions", "keep_versions", "integer", 0, 64),
    Key("update.reserve_bytes", "reserve_bytes", "integer", 0, 1 << 40),
    Key("update.soak_s", "soak_s", "number", 0, 86_400),
    Key("update.load_deadline_s", "load_deadline_s", "number", 1, 3_600),
    Key("update.keep_previous", "keep_previous", "choice", choices=KEEP),
    Key("update.memory_short", "memory_short", "choice", choices=MEMORY_SHORT),
    Key("update.memory_reserve_bytes", "memory_reserve_bytes", "integer", 0, 1 << 40),
    Key("update.soak_requests", "soak_requests", "integer", 1, LATEST_REQUESTS),
    Key("update.soak_error_percent", "soak_error_percent", "number", 0, 100),
    Key("update.soak_latency_ratio", "soak_latency_ratio", "number", 0, 1_000),
    Key("update.shadow_percent", "shadow_percent", "number", 0, 100),
    Key("update.shadow_s", "shadow_s", "number", 1, 86_400),
    Key("update.shadow_requests", "shadow_requests", "integer", 1, 100_000),
    Key("update.shadow_cosine", "shadow_cosine", "number", -1, 1),
    Key("update.shadow_mismatch_percent", "shadow_mismatch_percent", "number", 0, 100),
)
_TABLES = {key.name.partition(".")[0] for key in KEYS if "." in key.name}


@dataclass(frozen=True)
class AgentConfig:
    """What the file says, with defaults filled in. Durations in seconds, sizes in bytes.

    Attributes:
        device_id: the device's name in the fleet.
        control_address: host:port of the control plane.
        enrolment_address: host:port where certificates are asked for; by default the port after control's.
        control_bundle: PEM of the authorities to trust until the first certificate brings newer ones.
        control_token: enrols this box once; without one an operator approves it.
        control_certificate: another authority's certificate for this box; then nothing is enrolled or
            renewed.
        control_key: the private key of that certificate.
        control_server_name: in the control plane's certificate; empty: the embedded authority's.
        state_dir: everything the agent keeps.
        labels: sent with Hello; an operator's labels win over them.
        poll_interval_s: between polls while no stream stands; the control plane's Welcome may override it.
        reconnect_max_s: upper end of the reconnection backoff.
        inference_address: host:port that serves the Open Inference Protocol; port 0 takes a free one. Empty:
            only the unix socket serves it.
        inference_socket: path of a unix socket that serves it too; empty: none does.
        inference_group: name or number of the group whose members may use that socket; empty: the agent's.
        threads: of one model's runtime, unless its variant says otherwise.
        low_hold_load: of all cores, over which low-priority requests wait.
        low_spare_load: under which they may use the spare cores; see host_gate.py.
        process_bytes: most memory of its own that a worker process may hold; 0: by what it held once checked.
        cache_bytes: of outputs that the response cache keeps, all models together.
        crash_loop_deaths: of a version's processes, within the window: the box goes back.
        crash_loop_window_s: in which they are counted.
        runtimes: names of the runtimes that may be used; empty for all that work.
        delegates: TensorFlow Lite's external delegates on this box.
        model_control: whether inference clients may load and unload models.
        metrics_address: host:port that serves Prometheus metrics; empty: none are served.
        tracing_endpoint: of an OTLP collector, see tracing.py; empty: no traces.
        tracing_sample_ratio: share of requests traced whose clients did not decide.
        tracing_attributes: of the resource, with every span.
        admin_socket: path of the unix socket for `sluice-agent status` and the like.
        admin_group: name or number of the group whose members may administer the agent; empty: no group's.
        telemetry_interval_s: between samples.
        outbox_max_bytes: telemetry kept while the control plane is away; the oldest goes first.
        trust_root: file of the root that says whose signatures count; None: nothing is installed.
        keep_versions: versions kept on disk beside active and previous, as bases and for going back.
        reserve_bytes: disk space that an update must leave free.
        soak_s: how long a new version must stay healthy before its predecessor's worker is closed.
        load_deadline_s: longest time for a worker to load a model and answer its first inference.
        keep_previous: the previous version during the soak: one of KEEP.
        memory_short: what to do where two workers do not fit: one of MEMORY_SHORT.
        memory_reserve_bytes: memory that a second worker must leave free.
        soak_requests: to a new version and to the one before it; fewer say nothing.
        soak_error_percent: of requests that a new version may fail beyond those before; 100: any.
        soak_latency_ratio: of its 95th percentile to the one before; 0: any.
        shadow_percent: of live requests that a new version answers too before it is activated; 0: no shadow.
        shadow_s: longest time of that.
        shadow_requests: compared requests that suffice.
        shadow_cosine: least cosine similarity of each output in shadow.
        shadow_mismatch_percent: of compared requests that may be outside of that.
    """

    control_address: str
    device_id: str = ""
    enrolment_address: str = ""
    control_bundle: Path | None = None
    control_token: str = ""
    control_certificate: Path | None = None
    control_key: Path | None = None
    control_server_name: str = ""
    state_dir: Path = Path("/var/lib/sluice")
    labels: Mapping[str, str] = field(default_factory=dict)
    poll_interval_s: float = 900.0
    reconnect_max_s: float = 300.0
    inference_address: str = "127.0.0.1:8500"
    inference_socket: Path | None = None
    inference_group: str = ""
    threads: int = 1
    low_hold_load: float = HOLD_LOAD
    low_spare_load: float = SPARE_LOAD
    process_bytes: int = 0
    cache_bytes: int = CACHE_BYTES
    crash_loop_deaths: int = CRASH_LOOP_DEATHS
    crash_loop_window_s: float = CRASH_LOOP_WINDOW_S
    runtimes: tuple[str, ...] = ()
    delegates: tuple[ExternalDelegate, ...] = ()
    model_control: bool = False
    metrics_address: str = ""
    tracing_endpoint: str = ""
    tracing_sample_ratio: float = 1.0
    tracing_attributes: Mapping[str, str] = field(default_factory=dict)
    admin_socket: Path = Path()
    admin_group: str = ""
    telemetry_interval_s: float = 60.0
    outbox_max_bytes: int = 16 << 20
    trust_root: Path | None = None
    keep_versions: int = 1
    reserve_bytes: int = 64 << 20
    soak_s: float = 60.0
    load_deadline_s: float = 120.0
    keep_previous: str = "warm"
    memory_short: str = "refuse"
    memory_reserve_bytes: int = 32 << 20
    soak_requests: int = 50
    soak_error_percent: float = 5.0
    soak_latency_ratio: float = 2.0
    shadow_percent: float = 0.0
    shadow_s: float = 60.0
    shadow_requests: int = 100
    shadow_cosine: float = 0.95
    shadow_mismatch_percent: float = 5.0


def load(path: Path) -> AgentConfig:
    """Reads and checks the file. Raises SluiceError(CONFIG_INVALID) naming the file and the key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"cannot read the configuration {path}: {error.strerror or error}",
            hint="name it with --config; docs/agent-config.md has an example",
            obj=str(path),
        ) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise _invalid(path, "", f"is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        value = tomli.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomli.TOMLDecodeError, RecursionError) as error:
        raise _invalid(path, "", f"is not TOML: {error}") from error
    return parse(value, path)


def parse(value: Mapping[str, Any], path: Path) -> AgentConfig:
    """Checks a parsed file; pure, except that a missing device id is taken from the machine.

    Args:
        value: the TOML document.
        path: where it came from, for messages.
    """
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if name in _TABLES:
            if not isinstance(item, dict):
                raise _invalid(path, name, "must be a table")
            flat.update({f"{name}.{inner}": entry for inner, entry in item.items()})
        else:
            flat[name] = item
    fields: dict[str, Any] = {}
    for key in KEYS:
        if key.name in flat:
            fields[key.field] = _check(path, key, flat.pop(key.name))
    if flat:
        raise _invalid(path, min(flat), f"is not a key{_nearest(min(flat))}")
    if "control_address" not in fields:
        raise _invalid(path, "control.address", 'is required, e.g. "control.example:8470"')
    if "device_id" not in fields:
        fields["device_id"] = default_device_id()
    _default_trust(path, fields)
    _default_sockets(path, fields)
    hold, spare = (
        fields.get(name, getattr(AgentConfig, name)) for name in ("low_hold_load", "low_spare_load")
    )
    if spare > hold:
        raise _invalid(path, "inference.low_spare_load", f"must not be over low_hold_load, which is {hold:g}")
    return AgentConfig(**fields)


def _default_trust(path: Path, fields: dict[str, Any]) -> None:
    """Where certificates come from: another authority's files, all three, or the control plane."""
    external = {name: name in fields for name in ("control_certificate", "control_key")}
    if any(external.values()) and not (all(external.values()) and "control_bundle" in fields):
        raise _invalid(
            path, "control.certificate", "needs control.key and control.bundle beside it, and both it"
        )
    if "enrolment_address" not in fields:
        fields["enrolment_address"] = next_port(fields["control_address"])


def _default_sockets(path: Path, fields: dict[str, Any]) -> None:
    """Where the unix sockets are, and that TCP is closed where inference is restricted."""
    if "admin_socket" not in fields:
        fields["admin_socket"] = default_admin_socket(fields.get("state_dir", AgentConfig.state_dir))
    for name in ("admin.socket", "inference.socket"):
        given = fields.get(name.replace(".", "_"), Path())
        if len(bytes(given)) > MAX_SOCKET_PATH_BYTES:
            raise _invalid(
                path,
                name,
                f"is longer than the {MAX_SOCKET_PATH_BYTES} bytes that a socket's path may have: {given}",
            )
    if "inference_socket" in fields:
        fields.setdefault("inference_address", "")  # whoever restricts inference does not want it open too
    elif "inference_group" in fields:
        raise _invalid(path, "inference.group", "needs inference.socket: over TCP everybody on the box may")


def default_admin_socket(state_dir: Path) -> Path:
    """/run/sluice/agent.sock where systemd made that directory for the default state, else in the state."""
    if state_dir == AgentConfig.state_dir and _SYSTEMD_RUN_DIRECTORY.is_dir():
        return _SYSTEMD_RUN_DIRECTORY / "agent.sock"
    return state_dir / "agent.sock"


def default_device_id() -> str:
    """A stable name for this machine: from a hash of its machine id, which itself should stay private."""
    try:
        machine = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    if machine:
        return "box-" + hashlib.sha256(b"sluice device id:" + machine.encode()).hexdigest()[:16]
    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).lstrip("._-")[:64]
    return host or "box"


def _nearest(name: str) -> str:
    """What was probably meant: the key that reads most alike, else the keys of the same table."""
    names = [key.name for key in KEYS]
    alike = difflib.get_close_matches(name, names, 1, cutoff=0.8)
    if alike:
        return f"; did you mean {alike[0]}?"
    table = name.rpartition(".")[0]
    beside = [key for key in names if key.rpartition(".")[0] == table]
    return f"; {table or 'outside tables'} has {', '.join(beside)}" if beside else ""


def _check(path: Path, key: Key, value: Any) -> Any:
    """One value, checked and converted to the field's type."""
    if key.kind in ("number", "integer"):
        is_number = isinstance(value, int) or (key.kind == "number" and isinstance(value, float))
        if not is_number or isinstance(value, bool) or not key.least <= value <= key.most:
            what = "an integer" if key.kind == "integer" else "a number"
            raise _invalid(
                path, key.name, f"must be {what} from {key.least:g} to {key.most:g}, not {value!r:.60}"
            )
        return value if key.kind == "integer" else float(value)
    if key.kind == "flag":
        if not isinstance(value, bool):
            raise _invalid(path, key.name, f"must be true or false, not {value!r:.60}")
        return value
    if key.kind in ("texts", "delegates"):
        return (_labels if key.kind == "texts" else _delegates)(path, key.name, value)
    if key.kind == "runtimes":
        if not isinstance(value, list) or not all(
            isinstance(item, str) and item in RUNTIMES for item in value
        ):
            raise _invalid(path, key.name, f"must be a list of names out of {', '.join(RUNTIMES)}")
        return tuple(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _invalid(path, key.name, f"must be text, not {value!r:.60}")
    if key.choices and value not in key.choices:
        raise _invalid(path, key.name, f"must be one of {', '.join(key.choices)}, not {value!r:.60}")
    if key.kind == "device_id" and not _DEVICE_ID.fullmatch(value):
        raise _invalid(path, key.name, f"must be {_DEVICE_ID_RULE}, not {value[:80]!r}")
    if key.kind == "path":
        if not Path(value).is_absolute():
            raise _invalid(path, key.name, f"must be an absolute path, not {value[:80]!r}")
        return Path(value)
    if key.kind in ("address", "listen", "endpoint"):
        address = value.removeprefix("https://") if key.kind == "endpoint" else value
        _check_address(path, key.name, address, least_port=0 if key.kind == "listen" else 1)
    return value


def _check_address(path: Path, name: str, value: str, *, least_port: int) -> None:
    host, colon, port = value.rpartition(":")
    plain = port.isascii() and port.isdigit() and len(port) <= 5
    if not host or "/" in host or not colon or not plain or not least_port <= int(port) <= 65_535:
        raise _invalid(
            path, name, f"must be host:port with a port from {least_port} to 65535, not {value[:80]!r}"
        )


def _labels(path: Path, name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise _invalid(path, name, f"must be a table of at most {MAX_LABELS} texts")
    for label, text in value.items():
        if not isinstance(text, str) or max(len(label), len(text)) > MAX_LABEL_CHARACTERS or not label:
            raise _invalid(
                path, f"{name}.{label[:60]}", f"must be text of at most {MAX_LABEL_CHARACTERS} characters"
            )
    return dict(value)


def _delegates(path: Path, name: str, value: Any) -> tuple[ExternalDelegate, ...]:
    if not isinstance(value, dict) or len(value) > MAX_PROVIDERS:
        raise _invalid(path, name, f"must be a table of at most {MAX_PROVIDERS} delegates")
    found = []
    for delegate, fields in value.items():
        where = f"{name}.{delegate[:60]}"
        if not _DELEGATE.fullmatch(delegate) or delegate == CPU:
            raise _invalid(
                path, where, "must be named by 1 to 32 of a-z 0-9 _ starting with a letter, not cpu"
            )
        if not isinstance(fields, dict) or not {"library"} <= set(fields) <= {"library", "options"}:
            raise _invalid(path, where, "must be a table of library and, if need be, options")
        library, options = fields["library"], _labels(path, f"{where}.options", fields.get("options", {}))
        if not isinstance(library, str) or not Path(library).is_absolute() or "\0" in library:
            raise _invalid(path, f"{where}.library", f"must be an absolute path, not {library!r:.60}")
        found.append(ExternalDelegate(delegate, library, tuple(options.items())))
    return tuple(found)


def _invalid(path: Path, key: str, why: str) -> SluiceError:
    where = f"{path}: {key} {why}" if key else f"{path} {why}"
    return SluiceError(
        errors_pb2.CONFIG_INVALID, where, hint="docs/agent-config.md lists every key", obj=key or str(path)
    )
