"""What to do next after an error: the command that helps, for errors that come without advice."""

from __future__ import annotations

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_NEXT: dict[int, str] = {
    errors_pb2.CONTROL_UNREACHABLE: "start it with `sluice control serve`, or name another with --control "
    "HOST:PORT or SLUICE_CONTROL",
    errors_pb2.MODEL_UNKNOWN: "`sluice model list` shows the models; `sluice model push` adds one",
    errors_pb2.VERSION_UNKNOWN: "`sluice model list NAME` shows the model's versions",
    errors_pb2.ALIAS_UNKNOWN: "`sluice model list` shows each model's aliases",
    errors_pb2.VERSION_NOT_NEXT: "leave --version out to take the next number",
    errors_pb2.VERSION_CONFLICT: "leave --version out to take the next number",
    errors_pb2.FILE_UNKNOWN: "push again: `sluice model push`",
    errors_pb2.FILE_DIGEST_MISMATCH: "push again when nothing writes to the file",
    errors_pb2.MODEL_FILE_TRUNCATED: "copy or export the file again",
    errors_pb2.MODEL_FILE_INVALID: "export the file again as ONNX or TFLite",
    errors_pb2.DELTA_NOT_READY: "try again in a moment, or wait longer with --timeout 300",
    errors_pb2.DEVICE_UNKNOWN: "`sluice device list` shows the devices; one joins when its agent connects",
    errors_pb2.ROLLOUT_UNKNOWN: "`sluice rollout list` shows the rollouts",
    errors_pb2.ROLLOUT_EMPTY: "`sluice device list` shows the devices and their labels",
    errors_pb2.STATE_LOCKED: "another control plane uses this directory: stop it, or choose another --data",
    errors_pb2.DISK_FULL: "free space there, then run the same command again",
}


# Where the room that failed speaks to a device or a program; on the command line these are the next steps.
_INSTEAD: dict[int, str] = {
    errors_pb2.ROLLOUT_STATE: "`sluice rollout list` shows what runs; `sluice rollout abort ID` ends it",
    errors_pb2.DELTA_WRONG_BASE: "give the file that the delta was made from as BASE",
    errors_pb2.DELTA_INVALID: "make it again with `sluice delta create`",
    errors_pb2.DELTA_TRUNCATED: "copy the delta again, or make it again with `sluice delta create`",
    errors_pb2.DELTA_CORRUPT: "copy the delta again, or make it again with `sluice delta create`",
    errors_pb2.DELTA_UNSUPPORTED: "update sluice on this machine",
}

# What updater.wire says of any lost connection.
_GENERIC = "check the address and that the control plane runs"


def advise(error: SluiceError) -> None:
    """Gives an error its next step; advice that names one already stays."""
    if error.reason in _INSTEAD:
        error.hint = _INSTEAD[error.reason]
    elif not error.hint or error.hint == _GENERIC:
        error.hint = _NEXT.get(error.reason, "")
