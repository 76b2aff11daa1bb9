"""One upload stream: a file's bytes from an offset, in small chunks, watched for stalls.

The stream as a whole has no deadline, because a file of gigabytes over a slow link takes what it takes. It
has a deadline for progress instead: when the transport takes no chunk for `stall_s`, or the control plane
does not confirm the last one in time, the call is cancelled and counts as a lost connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from sluice.api.v1 import errors_pb2, registry_pb2
from updater.errors import SluiceError, os_errors
from updater.wire import from_rpc_error

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)


@dataclass(frozen=True)
class UploadLimits:
    """Limits of an upload.

    Attributes:
        chunk_bytes: of one message; the protocol allows 1 MiB. Small, so that a slow link shows progress.
        stall_s: longest wait for the transport to take a chunk.
        locked_s: longest wait for another upload of the same file that brings no byte forward. Longer than
            the control plane itself waits for a stream that went silent.
        store_bytes_per_s: how slowly the control plane may hash and fsync the file after the last chunk.
        poll_s: how often progress is reported and checked.
    """

    chunk_bytes: int = 64 << 10
    stall_s: float = 60.0
    locked_s: float = 120.0
    store_bytes_per_s: float = 10e6
    poll_s: float = 0.1


class _Source:
    """The request stream: the header, then the file's chunks. Consumed by gRPC's thread, read by ours."""

    def __init__(self, path: Path, header: registry_pb2.UploadHeader, chunk_bytes: int) -> None:
        self._path = path
        self._header = header
        self._chunk_bytes = chunk_bytes
        self.position = header.offset
        self.moved = time.monotonic()
        self.error: SluiceError | None = None

    def __iter__(self) -> Iterator[registry_pb2.UploadFileRequest]:
        try:
            yield from self._requests()
        except SluiceError as error:  # gRPC would only report "exception iterating requests"
            self.error = error
            raise

    def _requests(self) -> Iterator[registry_pb2.UploadFileRequest]:
        yield registry_pb2.UploadFileRequest(header=self._header)
        with os_errors("reading", self._path), self._path.open("rb") as file:
            file.seek(self.position)
            while self.position < self._header.size:
                chunk = file.read(min(self._chunk_bytes, self._header.size - self.position))
                if not chunk:
                    raise SluiceError(
                        errors_pb2.FILE_DIGEST_MISMATCH,
                        f"{self._path} became shorter while it was being uploaded",
                        hint="push again when nothing writes to the file",
                        obj=str(self._path),
                    )
                yield registry_pb2.UploadFileRequest(chunk=chunk)
                self.position += len(chunk)
                self.moved = time.monotonic()


def send_file(
    method: grpc.StreamUnaryMultiCallable[registry_pb2.UploadFileRequest, registry_pb2.UploadFileResponse],
    path: Path,
    digest: str,
    size: int,
    offset: int,
    *,
    peer: str,
    limits: UploadLimits,
    progress: Progress | None,
) -> int:
    """Sends a file from `offset` to its end and returns the bytes sent.

    Raises SluiceError: what the control plane answered, CONTROL_UNREACHABLE for a lost or stalled stream,
    IO_FAILED when the file cannot be read.
    """
    header = registry_pb2.UploadHeader(digest=digest, size=size, offset=offset)
    source = _Source(path, header, limits.chunk_bytes)
    doing = f"uploading {path.name}"
    call = method.future(iter(source))
    try:
        while True:
            try:
                call.result(timeout=limits.poll_s)
                break
            except grpc.FutureTimeoutError:
                if progress is not None:
                    progress(source.position, size)
                _check_stall(source, size, limits, doing, peer)
    except grpc.RpcError as error:
        raise source.error or from_rpc_error(error, doing, peer) from error
    finally:
        call.cancel()
    if progress is not None:
        progress(size, size)
    return size - offset


def _check_stall(source: _Source, size: int, limits: UploadLimits, doing: str, peer: str) -> None:
    idle = time.monotonic() - source.moved
    allowed = limits.stall_s
    if source.position >= size:
        allowed += size / limits.store_bytes_per_s
    if idle > allowed:
        raise SluiceError(
            errors_pb2.CONTROL_UNREACHABLE,
            f"{peer} took no bytes for {idle:.0f} s while {doing}",
            hint="check the link; running the same command again goes on where this one stopped",
            obj=peer,
        )
