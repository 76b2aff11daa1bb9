"""Builds one delta and proves it, in a process of its own: `python -m fleet.builder` with a job on stdin.

The control plane starts one such process for each delta, so that a crash, a hang or a leak of the encoder
costs that delta alone, and its memory goes back to the system. The process lowers its priority, limits its
private memory, and ends when its parent does. In order: encode, apply with this release's decoder, compare
the result's digest with the target's. Only then does it answer, with one JSON object on stdout; a failure is
an answer too: {"error": {"reason": …, "message": …}}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet.limits import BUILD_MEMORY_BYTES, BUILD_NICENESS
from sluice.api.v1 import errors_pb2
from updater import delta
from updater.delta import container
from updater.digests import digest_file
from updater.errors import SluiceError, os_errors
from updater.formats import TensorSpan, external_spans
from updater.limits import DecodeLimits


@dataclass(frozen=True)
class Job:
    """One delta to build.

    Attributes:
        base: the base file's path; None for a full copy.
        target: the target file's path.
        out: where the delta is written.
        proof: where the target is rebuilt for the comparison; gone afterwards.
        base_digest: what the base must have; empty for a full copy.
        target_digest: what the target must have.
        encoder: "module:function", called as `updater.delta.create`.
        base_model: where the base is external data, the path of the ONNX model that describes it; else empty.
        base_name: the name by which that model refers to it.
        target_model: the same for the target.
        target_name: the same for the target.
    """

    base: str | None
    target: str
    out: str
    proof: str
    base_digest: str
    target_digest: str
    encoder: str
    base_model: str = ""
    base_name: str = ""
    target_model: str = ""
    target_name: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def build(job: Job) -> dict[str, Any]:
    """Encodes, proves and describes. Raises SluiceError(DELTA_PROOF_FAILED and what encoding raises)."""
    base = Path(job.base) if job.base else None
    spans = {
        "base_spans": _external_spans(job.base_model, job.base_name),
        "target_spans": _external_spans(job.target_model, job.target_name),
    }
    known = {name: found for name, found in spans.items() if found}
    summary = _encoder(job.encoder)(base, Path(job.target), Path(job.out), **known)
    if summary.target_digest != job.target_digest or (base and summary.base_digest != job.base_digest):
        raise SluiceError(
            errors_pb2.STORE_CORRUPT,
            "the stored files are not what they were: "
            f"base {summary.base_digest}, target {summary.target_digest}",
            hint="check the control plane's disk",
            obj=job.target_digest,
        )
    _prove(job, base)
    regions = [asdict(region) for region in summary.regions]
    return {
        "digest": digest_file(Path(job.out)),
        "size": Path(job.out).stat().st_size,
        "base_size": base.stat().st_size if base else 0,
        "target_size": Path(job.target).stat().st_size,
        "features": _features(Path(job.out)),
        "regions": regions,
    }


def _external_spans(model: str, name: str) -> tuple[TensorSpan, ...]:
    """The tensors that a model has in an external data file; none where the file is not external data."""
    return external_spans(Path(model)).get(name, ()) if model else ()


def _prove(job: Job, base: Path | None) -> None:
    """Applies the delta as a device will. Raises SluiceError(DELTA_PROOF_FAILED)."""
    proof = Path(job.proof)
    try:
        delta.apply(base, Path(job.out), proof)
        rebuilt = digest_file(proof)
    except SluiceError as error:
        raise SluiceError(
            errors_pb2.DELTA_PROOF_FAILED,
            f"applying the new delta to {job.target_digest} failed: {error}",
            obj=job.target_digest,
        ) from error
    finally:
        proof.unlink(missing_ok=True)
    if rebuilt != job.target_digest:
        raise SluiceError(
            errors_pb2.DELTA_PROOF_FAILED,
            f"applying the new delta gives {rebuilt}, not {job.target_digest}",
            obj=job.target_digest,
        )


def _features(path: Path) -> list[str]:
    """What a decoder must have, from the delta's own header."""
    bounds = DecodeLimits()
    with os_errors("reading", path), path.open("rb") as file:
        start = file.read(container.PREFIX.size)
        rest = file.read(container.header_length(start, bounds) - len(start))
    return list(container.decode_header(start + rest, bounds).features)


def _encoder(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    encoder: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return encoder


def _end_with_parent() -> None:
    """Waits for the end of stdin, which the parent holds open: it ends when the parent does, however."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(1)


def main() -> None:
    """Reads a job's line, answers on stdout."""
    os.nice(BUILD_NICENESS)
    resource.setrlimit(resource.RLIMIT_DATA, (BUILD_MEMORY_BYTES, BUILD_MEMORY_BYTES))
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever an encoder prints goes to the log, not into the answer
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            sys.exit("no job on stdin")
        line += piece
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job(**json.loads(line))
    try:
        result = build(job)
    except SluiceError as error:
        result = {"error": {"reason": error.code, "message": str(error)}}
    except MemoryError:
        result = {
            "error": {
                "reason": "LIMIT_EXCEEDED",
                "message": f"encoding needs more than {BUILD_MEMORY_BYTES} bytes of memory",
            }
        }
    with open(answer, "wb") as out:  # noqa: PTH123 - a descriptor, not a path
        out.write(json.dumps(result).encode())


if __name__ == "__main__":
    main()
