"""The errors of a delta: each says at which place of the delta what is wrong, and what helps."""

from __future__ import annotations

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_FETCH_AGAIN = "discard what was fetched and fetch the delta again"


def invalid(message: str) -> SluiceError:
    """The structure is broken."""
    return SluiceError(errors_pb2.DELTA_INVALID, message, hint=_FETCH_AGAIN)


def truncated(message: str) -> SluiceError:
    """The delta ends early."""
    return SluiceError(errors_pb2.DELTA_TRUNCATED, message, hint="fetch the rest of the delta")


def corrupt(message: str) -> SluiceError:
    """A checksum or a coded stream does not hold."""
    return SluiceError(errors_pb2.DELTA_CORRUPT, message, hint=_FETCH_AGAIN)


def unsupported(message: str) -> SluiceError:
    """The delta needs a version or feature that this decoder lacks."""
    return SluiceError(
        errors_pb2.DELTA_UNSUPPORTED, message, hint="update sluice on this machine, or ask for a full copy"
    )


def over_limit(what: str, value: int, limit: int) -> SluiceError:
    """A length is over the decoder's limit; nothing was allocated for it."""
    return SluiceError(
        errors_pb2.DELTA_LIMIT_EXCEEDED,
        f"the delta asks for {value} {what}; the limit is {limit}",
        hint="create the delta with smaller blocks, or raise the limit where memory allows",
    )


def wrong_base(message: str, obj: str) -> SluiceError:
    """The base is not the file that the delta was made from."""
    return SluiceError(
        errors_pb2.DELTA_WRONG_BASE, message, hint="ask for a delta from the file that is there", obj=obj
    )


def target_mismatch(message: str, obj: str) -> SluiceError:
    """What the delta writes is not what was announced."""
    return SluiceError(errors_pb2.DELTA_TARGET_MISMATCH, message, hint=_FETCH_AGAIN, obj=obj)
