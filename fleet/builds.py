"""Starts delta builds, a few at a time, the awaited before those computed ahead.

Each build is one `fleet.builder` process with a deadline. What it leaves behind is either a file whose digest
and size this room can store, or a SluiceError that says why not; never both.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleet import log
from fleet.builder import Job
from fleet.disk import check_room
from fleet.limits import BUILD_OUTPUT_BYTES, BUILD_TIMEOUT_S, MAX_BUILDS_WAITING
from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason
from updater.errors import SluiceError
from updater.store import Store

AWAITED = 0  # a device waits
AHEAD = 1  # a device will ask, probably
_PREFIX = "build-"
_STDERR_CHARACTERS = 2000


@dataclass(frozen=True)
class Built:
    """A proven delta, still in staging.

    Attributes:
        path: the delta's file, on the delta store's file system.
        features: what a decoder must have beyond the base set.
        regions: JSON of its regions, in the target's order.
    """

    path: Path
    digest: str
    size: int
    base_size: int
    target_size: int
    features: list[str]
    regions: list[dict[str, Any]]


@dataclass(frozen=True)
class Described:
    """Where base or target is external data: the digest of the model that describes it and its name there."""

    base: tuple[str, str] | None = None
    target: tuple[str, str] | None = None


NOTHING = Described()


class Builds:
    """A queue in front of builder processes.

    Args:
        files: the store of bases and targets.
        deltas: the store in whose staging directory builds work.
        encoder: "module:function" for the builder.
        at_once: processes at a time.
        reserve: bytes kept free on the disk.
    """

    def __init__(self, files: Store, deltas: Store, encoder: str, at_once: int, reserve: int) -> None:
        self._files = files
        self._deltas = deltas
        self._encoder = encoder
        self._queue: asyncio.PriorityQueue[tuple[tuple[int, int], int, asyncio.Event]] = (
            asyncio.PriorityQueue(MAX_BUILDS_WAITING)
        )
        self._order = itertools.count()
        self._free = at_once
        self._reserve = reserve

    def clean(self) -> None:
        """Deletes what builds left that a crash ended. Call before the first build."""
        for path in self._deltas.staged():
            if path.name.startswith(_PREFIX):
                path.unlink(missing_ok=True)

    async def build(self, base: str, target: str, urgency: int, described: Described = NOTHING) -> Built:
        """Waits for a turn, builds and proves one delta.

        Args:
            base: the base file's digest; empty for a full copy.
            target: the target file's digest.
            urgency: AWAITED or AHEAD.
            described: the models that describe base and target, where those are external data.

        Raises SluiceError: what the encoder raised; DELTA_PROOF_FAILED; LIMIT_EXCEEDED when too many wait or
        the deadline passed; INTERNAL when the process died.
        """
        # Full copies go first: they are quick, every device can use them, and deltas compete with them.
        await self._turn((urgency, 0 if base == "" else 1))
        try:
            return await self._run(base, target, described)
        finally:
            self._free += 1
            self._wake()

    async def _turn(self, urgency: tuple[int, int]) -> None:
        turn = asyncio.Event()
        try:
            self._queue.put_nowait((urgency, next(self._order), turn))
        except asyncio.QueueFull:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED,
                f"{MAX_BUILDS_WAITING} deltas already wait to be computed",
                hint="ask again later, or accept a full copy",
            ) from None
        self._wake()
        await turn.wait()

    def _wake(self) -> None:
        while self._free > 0 and not self._queue.empty():
            self._free -= 1
            self._queue.get_nowait()[2].set()

    async def _run(self, base: str, target: str, described: Described) -> Built:
        name = _PREFIX + secrets.token_hex(8)
        out, proof = self._deltas.staging(name), self._deltas.staging(name + "-proof")
        job = Job(
            base=str(self._files.require(base)) if base else None,
            target=str(self._files.require(target)),
            out=str(out),
            proof=str(proof),
            base_digest=base,
            target_digest=target,
            encoder=self._encoder,
        )
        if described.base is not None:
            model, file = described.base
            job = replace(job, base_model=str(self._files.require(model)), base_name=file)
        if described.target is not None:
            model, file = described.target
            job = replace(job, target_model=str(self._files.require(model)), target_name=file)
        # The delta and the proof are each about as large as the target at worst.
        room = 2 * self._files.path(target).stat().st_size
        await asyncio.to_thread(check_room, self._deltas.root, room, self._reserve)
        try:
            answer = await _run_builder(job)
        except BaseException:
            for leftover in self._deltas.staged():
                if leftover.name.startswith((name, f".{name}")):
                    leftover.unlink(missing_ok=True)
            raise
        return Built(out, **answer)


async def _run_builder(job: Job) -> dict[str, Any]:
    """Starts the process and returns its answer, or raises what it failed with."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fleet.builder",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(BUILD_TIMEOUT_S):
            process.stdin.write(job.to_bytes() + b"\n")
            await process.stdin.drain()
            output, errors = await asyncio.gather(
                _read_most(process.stdout, BUILD_OUTPUT_BYTES), _read_tail(process.stderr)
            )
            code = await process.wait()
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _died(job, "it closed its input", "") from error
    except TimeoutError:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"building the delta to {job.target_digest} was ended after {BUILD_TIMEOUT_S:.0f} s",
            obj=job.target_digest,
        ) from None
    finally:
        process.stdin.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code != 0 or not output:
        raise _died(job, f"it ended with {code}", errors)
    answer: dict[str, Any] = json.loads(output)
    if "error" in answer:
        reason = ErrorReason.Value(answer["error"]["reason"])
        raise SluiceError(reason, answer["error"]["message"], obj=job.target_digest)
    return answer


def _died(job: Job, how: str, errors: str) -> SluiceError:
    log.warning("builder_died", base=job.base_digest, target=job.target_digest, how=how, stderr=errors)
    return SluiceError(
        errors_pb2.INTERNAL,
        f"the process that built the delta to {job.target_digest} died: {how}",
        hint="the control plane's log has what it printed",
        obj=job.target_digest,
    )


async def _read_most(stream: asyncio.StreamReader, limit: int) -> bytes:
    data = bytearray()
    while piece := await stream.read(65536):
        data += piece
        if len(data) > limit:
            raise SluiceError(
                errors_pb2.LIMIT_EXCEEDED, f"a delta's description is longer than {limit} bytes"
            )
    return bytes(data)


async def _read_tail(stream: asyncio.StreamReader) -> str:
    tail = b""
    while piece := await stream.read(65536):
        tail = (tail + piece)[-_STDERR_CHARACTERS:]
    return tail.decode("utf-8", "replace")
