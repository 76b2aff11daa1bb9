"""Applies a delta while it arrives: bytes in, target out, memory bounded by one block, resumable.

Order: header (compared with what was announced, base proven) -> blocks, each checked, decoded (some ahead,
where cores are free) and written at the end of `partial` -> end marker -> digest. Every SYNC_BYTES of target
the file is fsynced and the journal beside it says how far it is whole; after a kill a new Applier on the same
`partial` re-reads that much, compares its digest and goes on at that block, or starts over when anything
differs. Rules: nothing is written before the header was accepted; the target counts only when its SHA-256 is
right; a failed Applier is closed, and a new one resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from sluice.api.v1 import errors_pb2
from updater.atomic import replace_atomic
from updater.delta import container, faults, varint
from updater.delta.base import Base
from updater.delta.block import Block, decode_block
from updater.delta.container import BlockHead, Header
from updater.delta.journal import Journal, read_journal, read_tail, remove_journal, write_journal, write_tail
from updater.delta.pipeline import Decoded, Parts, Pipeline, free_cores
from updater.digests import PREFIX, READ_BYTES, digest_file
from updater.errors import SluiceError, os_errors
from updater.limits import BLOCK_OVERHEAD_BYTES, SYNC_BYTES, DecodeLimits

if TYPE_CHECKING:
    from hashlib import _Hash

_MOST_PARTS = 64  # of a block that are written one by one: many small ones cost a system call each
Progress = Callable[[int, int], None]  # (done, total) bytes of the target


class Applier:
    """Turns a stream of delta bytes into a target file.

    Args:
        base: the base file; None when the delta is a full copy.
        partial: where the target grows; its journal lies beside it. Both are kept by `close` for resuming.
        expected_target: the digest that the signed manifest announces; None to trust the header's.
        expected_size: bytes of that file.
        limits: what is accepted of the delta.
        delta_digest: the delta's own digest, if known: work on another delta is then never resumed.
        sync_bytes: target bytes written between two fsyncs with their journal.

    Raises:
        SluiceError: STATE_LOCKED when another Applier works on `partial`; IO_FAILED.
    """

    def __init__(
        self,
        base: Path | None,
        partial: Path,
        *,
        expected_target: str | None = None,
        expected_size: int | None = None,
        limits: DecodeLimits | None = None,
        delta_digest: str = "",
        sync_bytes: int = SYNC_BYTES,
    ) -> None:
        self._base = Base(base)
        self._partial = partial
        self._expected_target = expected_target
        self._expected_size = expected_size
        self._limits = limits or DecodeLimits()
        self._delta_digest = delta_digest
        self._sync_bytes = sync_bytes
        self._buffer = bytearray()
        self._consumed = 0  # delta bytes before the buffer
        self._header: Header | None = None
        self._header_bytes = b""
        self._head: BlockHead | None = None
        self._head_bytes = b""  # as it arrived
        self._blocks = 0  # read off the delta
        self._planned = 0  # target bytes of these
        self._written_blocks = 0
        self._written = 0  # target bytes of these
        self._recorded = 0  # of these, what the journal vouches for
        self._hash: _Hash = hashlib.sha256()
        self._whole: _Hash = self._hash  # the hash at the last block boundary
        self._boundary = 0  # the delta offset there
        self._ended = self._failed = self._finished = False
        self._pipeline = Pipeline(self._decoded, free_cores(self._limits.blocks_ahead))
        with os_errors("opening", partial):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(partial, flags, 0o644)
        try:
            self._lock()
            if not self._resume():
                self._restart()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Applier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def resume_offset(self) -> int:
        """The first delta byte still wanted: after a restart, where a block begins."""
        return self._consumed + len(self._buffer)

    @property
    def target_offset(self) -> int:
        """Target bytes written in whole blocks."""
        return self._written

    @property
    def header(self) -> Header | None:
        """The delta's header, once it has arrived."""
        return self._header

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the delta, cut anywhere.

        Raises:
            SluiceError: any DELTA code of a bad delta or base, DELTA_TARGET_MISMATCH for another target than
                the announced one, DISK_FULL, IO_FAILED. The Applier must then be closed.
        """
        if self._failed or self._finished:
            raise faults.invalid("bytes were fed to an applier that has failed or finished")
        self._failed = True  # until this call has gone well
        view = memoryview(data)
        for start in range(0, len(view), READ_BYTES):
            self._buffer += view[start : start + READ_BYTES]
            self._advance()
        self._failed = False

    def finish(self) -> str:
        """Says that the delta is complete; returns the target's digest. `partial` is then whole and fsynced.

        Raises:
            SluiceError: DELTA_TRUNCATED when more was to come; DELTA_TARGET_MISMATCH when the digest is
                wrong, with `partial` and its journal removed; DISK_FULL, IO_FAILED.
        """
        if self._failed:
            raise faults.invalid("an applier that has failed cannot finish")
        if self._header is None or not self._ended:
            raise faults.truncated(f"the delta ends at byte {self.resume_offset}, before its end marker")
        digest = PREFIX + self._hash.hexdigest()
        if digest != self._header.target_digest:
            self.discard()
            raise faults.target_mismatch(
                f"the delta wrote {digest} instead of {self._header.target_digest}", str(self._partial)
            )
        self._record()
        self._finished = True
        return digest

    def close(self) -> None:
        """Closes the files. Keeps what is needed to resume, or removes the journal after `finish`."""
        if self._file < 0:
            return
        try:
            if not self._failed:  # what was decoded ahead would be fetched again
                with contextlib.suppress(SluiceError):
                    for decoded in self._pipeline.drain():
                        self._take(decoded)
            if self._finished:
                remove_journal(self._partial)
            elif self._header is not None:
                # A journal that cannot be written now is no loss: the one before still holds.
                with contextlib.suppress(SluiceError):
                    if self._written > self._recorded or not self._recorded:
                        self._record()
                    if not self._failed and (tail := self._head_bytes + bytes(self._buffer)):
                        write_tail(self._partial, self._journal(), tail)
        finally:
            self._release()

    def discard(self) -> None:
        """Closes the files and removes the partial target and its journal. Raises SluiceError(IO_FAILED)."""
        self._release()
        remove_journal(self._partial)
        with os_errors("removing", self._partial):
            self._partial.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SluiceError(
                errors_pb2.STATE_LOCKED,
                f"another process is writing {self._partial}",
                hint="wait for it to end",
                obj=str(self._partial),
            ) from error

    def _release(self) -> None:
        self._pipeline.close()
        self._base.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _restart(self) -> None:
        remove_journal(self._partial)
        with os_errors("emptying", self._partial):
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)

    def _resume(self) -> bool:
        """Takes up the journal's point, if it is one of this delta, this base and this target."""
        journal = read_journal(self._partial)
        if journal is None or (self._delta_digest and journal.delta_digest != self._delta_digest):
            return False
        try:
            start = journal.header[: container.PREFIX.size].ljust(container.PREFIX.size)
            if container.header_length(start, self._limits) != len(journal.header):
                return False
            header = container.decode_header(journal.header, self._limits)
            self._announced(header)
            self._base.open(header)
        except SluiceError as error:
            self._base.close()
            if error.reason == errors_pb2.IO_FAILED:
                raise
            return False
        hasher = self._hash_prefix(journal.target_offset)
        if (
            hasher is None
            or hasher.hexdigest() != journal.prefix_digest
            or journal.blocks > header.block_count
        ):
            self._base.close()
            return False
        self._hash, self._whole = hasher, hasher.copy()
        self._header, self._header_bytes = header, journal.header
        self._blocks, self._consumed, self._boundary = (
            journal.blocks,
            journal.delta_offset,
            journal.delta_offset,
        )
        self._written_blocks = journal.blocks
        self._written = self._planned = self._recorded = journal.target_offset
        with os_errors("cutting back", self._partial):
            os.ftruncate(self._file, journal.target_offset)
            os.lseek(self._file, journal.target_offset, os.SEEK_SET)
        most = header.block_size + BLOCK_OVERHEAD_BYTES + container.MOST_HEAD_BYTES
        self._buffer += read_tail(self._partial, journal, most)
        return True

    def _hash_prefix(self, length: int) -> _Hash | None:
        hasher = hashlib.sha256()
        with os_errors("reading", self._partial):
            os.lseek(self._file, 0, os.SEEK_SET)
            while length:
                piece = os.read(self._file, min(length, READ_BYTES))
                if not piece:
                    return None
                hasher.update(piece)
                length -= len(piece)
        return hasher

    def _announced(self, header: Header) -> None:
        """Refuses a delta to another file than the one that was announced."""
        if self._expected_target is not None and header.target_digest != self._expected_target:
            raise faults.target_mismatch(
                f"the delta writes {header.target_digest}; {self._expected_target} was announced",
                str(self._partial),
            )
        if self._expected_size is not None and header.target_size != self._expected_size:
            raise faults.target_mismatch(
                f"the delta writes {header.target_size} bytes; {self._expected_size} were announced",
                str(self._partial),
            )

    def _advance(self) -> None:
        """Decodes as much as the buffer holds."""
        while self._buffer and (self._block() if self._header is not None else self._start()):
            pass

    def _start(self) -> bool:
        container.check_magic(bytes(self._buffer[: len(container.MAGIC)]))
        if len(self._buffer) < container.PREFIX.size:
            return False
        length = container.header_length(bytes(self._buffer[: container.PREFIX.size]), self._limits)
        if len(self._buffer) < length:
            return False
        data = bytes(self._buffer[:length])
        header = container.decode_header(data, self._limits)
        self._announced(header)
        self._base.open(header)
        self._header, self._header_bytes = header, data
        self._drop(length)
        self._boundary = self._consumed
        return True

    def _block(self) -> bool:
        header = self._header
        assert header is not None
        if self._head is None:
            if self._blocks == header.block_count:
                return self._end(header)
            try:
                self._head, length = container.scan_block_head(self._buffer, self._blocks, header.block_size)
            except varint.Incomplete:
                return False
            self._head_bytes = bytes(self._buffer[:length])
            self._drop(length)
        head = self._head
        if len(self._buffer) < head.payload_length:
            return False
        with memoryview(self._buffer) as arrived:  # sliced without a copy of its own
            payload = bytes(arrived[: head.payload_length])
        self._drop(head.payload_length)
        self._decode(header, head, payload)
        return True

    def _decode(self, header: Header, head: BlockHead, payload: bytes) -> None:
        seed = container.header_checksum(self._header_bytes)
        if container.block_checksum(seed, self._blocks, head.fields, payload) != head.checksum:
            raise faults.corrupt(f"the checksum of block {self._blocks} does not match")
        self._blocks += 1
        if self._planned + head.target_length > header.target_size:
            raise faults.invalid(
                f"block {self._blocks} writes beyond the target's {header.target_size} bytes"
            )
        block = Block(payload, self._planned, head.target_length)
        self._head, self._head_bytes = None, b""
        self._planned += head.target_length
        for decoded in self._pipeline.put(block, self._consumed):
            self._take(decoded)

    def _decoded(self, block: Block) -> Parts:
        """A block's bytes, in a thread of the pipeline."""
        assert self._header is not None
        parts: Parts = []
        try:
            decode_block(block, self._header.features, self._base.read, parts.append, self._limits)
        except SluiceError as error:
            error.obj = error.obj or f"the block at byte {block.target_offset} of the target"
            raise
        return parts if len(parts) <= _MOST_PARTS else [b"".join(parts)]

    def _take(self, decoded: Decoded) -> None:
        """Writes a block whose turn has come."""
        for part in decoded.parts:
            self._write(part)
        self._written_blocks += 1
        self._written += decoded.length
        self._boundary = decoded.boundary
        self._whole = self._hash.copy()
        if self._written - self._recorded >= self._sync_bytes:
            self._record()

    def _end(self, header: Header) -> bool:
        if self._ended or len(self._buffer) > 1:
            raise faults.invalid("the delta has bytes after its end marker")
        if self._buffer[0] != container.MARK_END:
            raise faults.invalid(f"expected the end marker, found the byte 0x{self._buffer[0]:02x}")
        for decoded in self._pipeline.drain():
            self._take(decoded)
        if self._written != header.target_size:
            raise faults.invalid(
                f"the delta writes {self._written} bytes; its header says {header.target_size}"
            )
        self._drop(1)
        self._ended = True
        return False

    def _drop(self, length: int) -> None:
        del self._buffer[:length]
        self._consumed += length

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        view = memoryview(data)
        with os_errors("writing", self._partial):
            while view:
                view = view[os.write(self._file, view) :]

    def _record(self) -> None:
        """Forces the target to disk, then says so in the journal."""
        with os_errors("writing", self._partial):
            os.fsync(self._file)
        write_journal(self._partial, self._journal())
        self._recorded = self._written

    def _journal(self) -> Journal:
        return Journal(
            self._header_bytes,
            self._delta_digest,
            self._written_blocks,
            self._boundary,
            self._written,
            self._whole.hexdigest(),
        )


def apply(base: Path | None, delta: Path, out: Path, *, progress: Progress | None = None) -> str:
    """Writes the target of a delta to `out`, which appears only when it is right; returns its digest.

    Work is done in a hidden file beside `out` and resumes there after a kill. `out` may be `base`.

    Raises:
        SluiceError: as `Applier`; `out` is then as it was.
    """
    delta_digest = digest_file(delta)
    partial = out.with_name(f".{out.name}.partial")
    applier = Applier(base, partial, delta_digest=delta_digest)
    with applier:
        try:
            with os_errors("reading", delta), delta.open("rb") as file:
                file.seek(applier.resume_offset)
                while piece := file.read(READ_BYTES):
                    applier.feed(piece)
                    if progress is not None and applier.header is not None:
                        progress(applier.target_offset, applier.header.target_size)
            digest = applier.finish()
            replace_atomic(partial, out)
        except SluiceError as error:
            if error.reason != errors_pb2.DISK_FULL:
                applier.discard()
            raise
    return digest
