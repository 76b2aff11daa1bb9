"""Makes a delta from two files: the target as a program over the base.

Order: find the tensors of both files, match them, cut the target into pieces and blocks, code each block
several ways and keep the smallest, write header and blocks, put the file in place. Rules: any file can be a
base or a target (one that no reader understands is opaque); inputs are mapped, and only a few blocks are in
flight; equal input gives equal output, whatever the number of threads.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sluice.api.v1 import errors_pb2
from updater import limits
from updater.atomic import replace_atomic
from updater.delta import container
from updater.delta.applier import Progress
from updater.delta.block_encoder import BlockEncoder, Found
from updater.delta.container import Header
from updater.delta.guessing import known_spans, with_guesses
from updater.delta.matching import match_tensors
from updater.delta.plan import Piece, make_blocks, make_pieces
from updater.delta.program.encoder import ProgramEncoder
from updater.delta.regions import Region, describe
from updater.digests import digest_bytes, digest_file
from updater.errors import SluiceError, os_errors
from updater.formats.span import TensorSpan

Bytes = NDArray[np.uint8]
_MAX_LEVEL = 22
_GUESSED = 8  # below this part of a target, what is guessed between tensors is only tried at effort max


@dataclass(frozen=True)
class EncodeOptions:
    """How much work the encoder does.

    Attributes:
        level: zstd level, 1 to 22.
        block_size: the most target bytes that a block writes, in a full copy at most FULL_BLOCK_BYTES;
            decoders' memory follows from it.
        threads: blocks coded at a time; 0 for one for each CPU.
        effort: "fast" does without programs; "default"; "max" also tries what takes long.
    """

    level: int = 19
    block_size: int = limits.DEFAULT_BLOCK_BYTES
    threads: int = 0
    effort: str = "default"


EFFORTS = ("fast", "default", "max")


@dataclass(frozen=True)
class DeltaSummary:
    """What `create` made. Sizes in bytes; without a base its digest is None and its size 0.

    `pool_bytes` are those of the delta that hold entropy coded residuals with their tables; `entropy_bytes`
    is what the residuals would take at the entropy of their symbols in the coder's contexts.
    """

    delta_digest: str
    delta_size: int
    base_digest: str | None
    base_size: int
    target_digest: str
    target_size: int
    regions: tuple[Region, ...]
    pool_bytes: int
    entropy_bytes: float


def create(
    base: Path | None,
    target: Path,
    out: Path,
    *,
    options: EncodeOptions | None = None,
    progress: Progress | None = None,
    base_spans: Sequence[TensorSpan] | None = None,
    target_spans: Sequence[TensorSpan] | None = None,
) -> DeltaSummary:
    """Writes to `out` the delta that turns `base` into `target`.

    Args:
        base: the old file; None for a full copy.
        target: the new file.
        out: where the delta goes; it appears only when complete.
        options: how much work is done.
        progress: called with (done, total) bytes of the target after each block.
        base_spans: the base's tensors, where its content does not show them (external data of an ONNX
            model: `updater.formats.external_spans`); None to read them from the file.
        target_spans: the target's tensors, likewise.

    Raises:
        SluiceError: IO_FAILED, DISK_FULL; REQUEST_INVALID for options out of range; LIMIT_EXCEEDED for a
            target over MAX_TARGET_BYTES.
    """
    options = _checked(options or EncodeOptions())
    with ExitStack() as stack:
        old = stack.enter_context(_mapped(base)) if base is not None else np.empty(0, dtype=np.uint8)
        new = stack.enter_context(_mapped(target))
        if len(new) > limits.MAX_TARGET_BYTES:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{target} has {len(new)} bytes; a delta writes {limits.MAX_TARGET_BYTES} at most",
                obj=str(target),
            )
        old_spans: Sequence[TensorSpan] = ()
        if base is not None:
            old_spans = base_spans if base_spans is not None else known_spans(base)
        new_spans = target_spans if target_spans is not None else known_spans(target)
        known = old_spans, new_spans
        old_spans, new_spans = _guessed(old, new, known)
        matches = match_tensors(old, old_spans, new, new_spans)
        most = options.block_size if base is not None else min(options.block_size, limits.FULL_BLOCK_BYTES)
        blocks = make_blocks(make_pieces(old, new, matches), most)
        if len(blocks) > limits.MAX_SMALL_BLOCKS + len(new) // limits.MEAN_BLOCK_BYTES:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"blocks of {options.block_size} bytes are too small for a target of {len(new)}",
                obj="block_size",
            )
        digests = (digest_bytes(old.data) if base is not None else None, digest_bytes(new.data))
        with os_errors("writing the delta", out), tempfile.TemporaryFile(dir=out.parent) as spool:
            programs = []
            thorough = options.effort == "max"
            if options.effort != "fast":
                level = _MAX_LEVEL if thorough else options.level
                programs.append(ProgramEncoder(old, old_spans, new, new_spans, level, thorough))
                more = _guessed(old, new, known, between=True)
                extra = [(span.offset, span.length) for span in set(more[1]) - set(new_spans)]
                if extra and (thorough or _GUESSED * sum(length for _, length in extra) >= len(new)):
                    programs.append(ProgramEncoder(old, more[0], new, more[1], level, thorough, extra))
            encoder = BlockEncoder(old, new, options.level, programs, thorough)
            totals = _encode(encoder, len(new), blocks, options.threads, progress, spool)
            header = Header(
                digests[0],
                len(old),
                digests[1],
                len(new),
                most,
                len(totals.sizes),
                tuple(sorted(totals.features)),
            )
            _write(out, header, spool, totals.sizes)
        sizes_of = (len(old), len(new))
    regions = describe(base, out, target, base_spans=old_spans, target_spans=new_spans)
    delta_digest, delta_size = digest_file(out), out.stat().st_size
    return DeltaSummary(
        delta_digest,
        delta_size,
        digests[0],
        sizes_of[0],
        digests[1],
        sizes_of[1],
        regions,
        totals.pool_bytes,
        totals.entropy_bytes,
    )


def _guessed(
    old: Bytes, new: Bytes, known: tuple[Sequence[TensorSpan], Sequence[TensorSpan]], *, between: bool = False
) -> tuple[tuple[TensorSpan, ...], tuple[TensorSpan, ...]]:
    """The spans of both files that readers know, with guesses."""
    return (
        with_guesses(old, known[0], new, known[1], between=between),
        with_guesses(new, known[1], old, known[0], between=between),
    )


def _checked(options: EncodeOptions) -> EncodeOptions:
    for name, value, low, high in (
        ("level", options.level, 1, 22),
        ("block_size", options.block_size, limits.MIN_BLOCK_BYTES, limits.MAX_BLOCK_BYTES),
        ("threads", options.threads, 0, limits.MAX_ENCODER_THREADS),
    ):
        if not low <= value <= high:
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"the option {name} is {value}; it may be {low} to {high}",
                obj=name,
            )
    if options.effort not in EFFORTS:
        raise SluiceError(
            errors_pb2.REQUEST_INVALID,
            f"the option effort is {options.effort!r}; it may be {', '.join(EFFORTS)}",
            obj="effort",
        )
    return options


@contextmanager
def _mapped(path: Path) -> Iterator[Bytes]:
    """A file's bytes, mapped read-only."""
    with os_errors("reading", path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            yield np.empty(0, dtype=np.uint8)
            return
        # The mapping ends with the last array that refers to it.
        yield np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), dtype=np.uint8)


@dataclass
class _Totals:
    """What the coded blocks come to; `sizes` are each block's (payload, target) lengths."""

    features: set[str] = field(default_factory=set)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pool_bytes: int = 0
    entropy_bytes: float = 0.0


def _encode(
    encoder: BlockEncoder,
    total: int,
    blocks: Sequence[Sequence[Piece]],
    threads: int,
    progress: Progress | None,
    spool: IO[bytes],
) -> _Totals:
    """Codes the blocks into `spool`."""
    totals = _Totals()
    done = 0
    threads = threads or os.cpu_count() or 1
    running: deque[tuple[int, Future[Found]]] = deque()

    def collect() -> None:
        nonlocal done
        length, future = running.popleft()
        for written, block in future.result().blocks:
            totals.features.update(block.features)
            totals.sizes.append((len(block.payload), written))
            totals.pool_bytes += block.pool_bytes
            totals.entropy_bytes += block.entropy_bytes
            spool.write(block.payload)
        done += length
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(threads, thread_name_prefix="delta-encoder") as pool:
        for pieces in blocks:
            length = sum(piece.length for piece in pieces)
            running.append((length, pool.submit(encoder.encode, pieces)))
            if len(running) > threads:
                collect()
        while running:
            collect()
    return totals


def _write(out: Path, header: Header, spool: IO[bytes], sizes: Sequence[tuple[int, int]]) -> None:
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            start = container.encode_header(header)
            seed = container.header_checksum(start)
            file.write(start)
            spool.seek(0)
            for number, (payload_length, target_length) in enumerate(sizes):
                file.write(container.encode_block(seed, number, target_length, spool.read(payload_length)))
            file.write(bytes([container.MARK_END]))
        replace_atomic(temporary, out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
