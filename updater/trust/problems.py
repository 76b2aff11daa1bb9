"""What python-tuf and securesystemslib refuse, as SluiceErrors with sluice's own reasons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tuf.api import exceptions
from tuf.api.serialization import DeserializationError

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_REFRESH = "the next fetch may bring it right; `sluice trust verify` explains the chain"


@contextmanager
def trust_errors(doing: str, obj: str = "") -> Iterator[None]:
    """Turns a failure of python-tuf inside the block into a SluiceError.

    Args:
        doing: what the block does, as a phrase: "refreshing the signed metadata".
        obj: what it does that to.
    """
    try:
        yield
    except SluiceError:
        raise
    except (exceptions.RepositoryError, exceptions.DownloadError, DeserializationError, OSError) as error:
        raise translated(error, doing, obj) from error


def translated(error: Exception, doing: str, obj: str = "") -> SluiceError:
    """The SluiceError for what python-tuf raised."""
    inner = error.__cause__ or error.__context__
    if isinstance(error, exceptions.DownloadError) and isinstance(inner, SluiceError):
        return inner  # our own fetcher's, wrapped on its way
    why = f"{doing}: {error}"
    if isinstance(error, exceptions.ExpiredMetadataError):
        return SluiceError(
            errors_pb2.METADATA_EXPIRED,
            why,
            hint="check this machine's clock; else the keys' owners must sign anew: `sluice trust renew`",
            obj=obj,
        )
    if isinstance(error, exceptions.BadVersionNumberError):
        return SluiceError(
            errors_pb2.METADATA_ROLLED_BACK,
            why,
            hint="somebody serves old metadata, or the control plane was restored from a backup: "
            "`sluice trust publish` brings it the newest",
            obj=obj,
        )
    if isinstance(error, exceptions.UnsignedMetadataError):
        return SluiceError(
            errors_pb2.SIGNATURE_INVALID,
            why,
            hint=f"is the pinned root this fleet's? else {_REFRESH}",
            obj=obj,
        )
    if isinstance(error, exceptions.DownloadHTTPError):
        return SluiceError(errors_pb2.METADATA_INVALID, f"{why} (it is not there)", hint=_REFRESH, obj=obj)
    if isinstance(error, exceptions.DownloadLengthMismatchError):
        return SluiceError(errors_pb2.LIMIT_EXCEEDED, why, hint=_REFRESH, obj=obj)
    if isinstance(error, exceptions.DownloadError):
        return SluiceError(errors_pb2.CONTROL_UNREACHABLE, why, obj=obj)
    if isinstance(error, OSError):
        return SluiceError(
            errors_pb2.IO_FAILED, why, hint="check the path, its permissions and the disk", obj=obj
        )
    return SluiceError(errors_pb2.METADATA_INVALID, why, hint=_REFRESH, obj=obj)
