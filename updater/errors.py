"""The one exception that crosses sluice's rooms, with its stable code.

An error says what was being done, to what, why it failed and what helps. `reason` is the stable code of
`proto/sluice/api/v1/errors.proto`; each has one gRPC status code and one exit code, both from the tables
here. Foreign exceptions are turned into this one at the edge where they arise, and never swallowed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason

DOMAIN = "sluice"

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: (
        errors_pb2.MODEL_FILE_TRUNCATED,
        errors_pb2.MODEL_FILE_INVALID,
        errors_pb2.MANIFEST_INVALID,
        errors_pb2.FILE_DIGEST_MISMATCH,
        errors_pb2.INPUT_INVALID,
        errors_pb2.DEVICE_ID_INVALID,
        errors_pb2.REQUEST_INVALID,
        errors_pb2.CONFIG_INVALID,
        errors_pb2.CERTIFICATE_INVALID,
        errors_pb2.METADATA_INVALID,
    ),
    grpc.StatusCode.UNAUTHENTICATED: (
        errors_pb2.UNAUTHENTICATED,
        errors_pb2.CERTIFICATE_EXPIRED,
        errors_pb2.CERTIFICATE_REVOKED,
    ),
    grpc.StatusCode.PERMISSION_DENIED: (
        errors_pb2.PERMISSION_DENIED,
        errors_pb2.ENROLMENT_REFUSED,
        errors_pb2.TOKEN_INVALID,
        errors_pb2.SIGNATURE_INVALID,
        errors_pb2.VERSION_NOT_SIGNED,
        errors_pb2.VERSION_BELOW_FLOOR,
    ),
    grpc.StatusCode.NOT_FOUND: (
        errors_pb2.MODEL_UNKNOWN,
        errors_pb2.VERSION_UNKNOWN,
        errors_pb2.FILE_UNKNOWN,
        errors_pb2.ALIAS_UNKNOWN,
        errors_pb2.DEVICE_UNKNOWN,
        errors_pb2.ROLLOUT_UNKNOWN,
        errors_pb2.REGION_UNKNOWN,
    ),
    grpc.StatusCode.FAILED_PRECONDITION: (
        errors_pb2.VERSION_NOT_NEXT,
        errors_pb2.VERSION_RETIRED,
        errors_pb2.NO_COMPATIBLE_VARIANT,
        errors_pb2.RUNTIME_UNAVAILABLE,
        errors_pb2.NO_PREVIOUS_VERSION,
        errors_pb2.ROLLOUT_STATE,
        errors_pb2.ROLLOUT_EMPTY,
        errors_pb2.DELTA_WRONG_BASE,
        errors_pb2.DELTA_UNSUPPORTED,
        errors_pb2.STATE_LOCKED,
        errors_pb2.METADATA_EXPIRED,
        errors_pb2.METADATA_ROLLED_BACK,
        errors_pb2.KEY_UNAVAILABLE,
    ),
    grpc.StatusCode.ALREADY_EXISTS: (
        errors_pb2.VERSION_CONFLICT,
        errors_pb2.IDENTITY_CONFLICT,
        errors_pb2.REGION_EXISTS,
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        errors_pb2.DISK_FULL,
        errors_pb2.LIMIT_EXCEEDED,
        errors_pb2.DELTA_LIMIT_EXCEEDED,
        errors_pb2.OUT_OF_MEMORY,
        errors_pb2.MEMORY_SHORT,
    ),
    grpc.StatusCode.DATA_LOSS: (
        errors_pb2.DELTA_INVALID,
        errors_pb2.DELTA_TRUNCATED,
        errors_pb2.DELTA_CORRUPT,
        errors_pb2.DELTA_TARGET_MISMATCH,
        errors_pb2.STORE_CORRUPT,
        errors_pb2.AUDIT_BROKEN,
    ),
    grpc.StatusCode.UNAVAILABLE: (
        errors_pb2.ENROLMENT_PENDING,
        errors_pb2.DELTA_NOT_READY,
        errors_pb2.MODEL_NOT_SERVING,
        errors_pb2.WORKER_DIED,
        errors_pb2.CONTROL_UNREACHABLE,
        errors_pb2.AGENT_UNREACHABLE,
        errors_pb2.CASCADE_INCOMPLETE,
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: (errors_pb2.WORKER_TIMEOUT, errors_pb2.DEVICE_SILENT),
    grpc.StatusCode.ABORTED: (
        errors_pb2.GOLDEN_MISMATCH,
        errors_pb2.MODEL_LOAD_FAILED,
        errors_pb2.WARM_UP_FAILED,
        errors_pb2.CASCADE_INVALID,
        errors_pb2.SHADOW_MISMATCH,
        errors_pb2.SOAK_FAILED,
    ),
    grpc.StatusCode.INTERNAL: (
        errors_pb2.INTERNAL,
        errors_pb2.IO_FAILED,
        errors_pb2.DELTA_PROOF_FAILED,
    ),
}
STATUS_OF_REASON: dict[int, grpc.StatusCode] = {
    reason: code for code, reasons in _STATUS.items() for reason in reasons
}

# Exit codes of both commands: 0 done, 1 failed (a defect or an unexpected refusal), 2 wrong usage (as click
# and argparse give it), and these, so that scripts can tell what to do next.
EXIT_FAILED = 1
EXIT_OF_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 3,  # the input is wrong: mend it
    grpc.StatusCode.NOT_FOUND: 4,  # no such thing
    grpc.StatusCode.FAILED_PRECONDITION: 5,  # not in this state
    grpc.StatusCode.ALREADY_EXISTS: 5,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 6,  # disk or a limit
    grpc.StatusCode.DATA_LOSS: 7,  # damaged bytes
    grpc.StatusCode.UNAVAILABLE: 8,  # try again later
    grpc.StatusCode.DEADLINE_EXCEEDED: 8,
    grpc.StatusCode.ABORTED: 9,  # the model was refused
    grpc.StatusCode.UNAUTHENTICATED: 10,  # nobody vouches for the caller, or not any more
    grpc.StatusCode.PERMISSION_DENIED: 10,  # not for this caller, or not signed by whoever must
}


class SluiceError(Exception):
    """A failure that a person or program can act on.

    Args:
        reason: the stable code, a value of `ErrorReason`.
        message: what was being done, to what, and why it failed; one or two sentences.
        hint: what helps, possibly a command to run; may be empty.
        obj: the object concerned, e.g. a path, digest or `model@version`; may be empty.
    """

    def __init__(self, reason: ErrorReason.ValueType, message: str, *, hint: str = "", obj: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.obj = obj

    @property
    def code(self) -> str:
        """The reason's name, e.g. "DELTA_WRONG_BASE"."""
        return ErrorReason.Name(self.reason)

    @property
    def status(self) -> grpc.StatusCode:
        return STATUS_OF_REASON.get(self.reason, grpc.StatusCode.UNKNOWN)

    @property
    def exit_code(self) -> int:
        return EXIT_OF_STATUS.get(self.status, EXIT_FAILED)

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}"
        return f"{text} ({self.hint})" if self.hint else text

    def as_dict(self) -> dict[str, str]:
        """The `--json` form of an error."""
        return {"reason": self.code, "message": self.message, "hint": self.hint, "object": self.obj}


@contextmanager
def os_errors(doing: str, obj: object) -> Iterator[None]:
    """Turns an OSError inside the block into DISK_FULL or IO_FAILED.

    Args:
        doing: what the block does, as a phrase: "writing the staged file".
        obj: what it does that to, usually a path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SluiceError(
                errors_pb2.DISK_FULL,
                f"no space left while {doing} {obj}",
                hint="free space on this file system; the update resumes where it stopped",
                obj=str(obj),
            ) from error
        raise SluiceError(
            errors_pb2.IO_FAILED,
            f"the system refused while {doing} {obj}: {error.strerror or error}",
            hint="check the path, its permissions and the disk",
            obj=str(obj),
        ) from error
