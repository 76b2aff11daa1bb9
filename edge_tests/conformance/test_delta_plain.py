"""The plain decoder, which follows the document, and the engine agree to the bit on all of the format."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from edge_tests.conformance import crafted
from edge_tests.conformance.cases import GROUPS, tensors
from edge_tests.conformance.crafted import Case
from edge_tests.conformance.plain import limits as plain_limits
from edge_tests.conformance.plain.delta import decode
from edge_tests.conformance.plain.fault import Fault
from edge_tests.conformance.plain.header import FEATURES
from edge_tests.conformance.plain.number import to_half, widened
from edge_tests.conformance.plain.pool import POOLS
from edge_tests.conformance.plain.record import NAMES
from edge_tests.harness import models
from sluice.api.v1 import errors_pb2
from updater import delta, limits
from updater.delta import container
from updater.delta.program import body, records, residuals
from updater.errors import SluiceError

ROOT = Path(__file__).resolve().parents[2]
SHARED_PAIRS = Path(os.environ.get("SLUICE_PAIRS", ROOT.parent / "shared" / "pairs"))
SMALL_PAIRS = ("git_microspeech", "git_kws_i8_a", "git_resnet_f32_to_i8")
ALLOWED_MODULES = {
    *("__future__", "collections", "ctypes", "dataclasses", "hashlib", "lzma", "math", "os", "pathlib"),
    *("re", "struct", "sys", "typing", "zlib", "zstandard"),
}


@cache
def made(group: Callable[[], Iterator[Case]]) -> tuple[Case, ...]:
    return tuple(group())


def applied(case: Case, directory: Path) -> bytes:
    """What the engine makes of a delta."""
    (directory / "base").write_bytes(case.base)
    (directory / "delta").write_bytes(case.delta)
    delta.apply(directory / "base", directory / "delta", directory / "out")
    return (directory / "out").read_bytes()


@pytest.mark.parametrize("group", GROUPS)
def test_both_decoders_give_the_same_bytes(group: Callable[[], Iterator[Case]], tmp_path: Path) -> None:
    for case in made(group):
        assert applied(case, tmp_path) == case.target, case.name
        assert decode(case.base, case.delta) == case.target, case.name


def test_the_cases_cover_the_format() -> None:
    """Every operation, type, residual, pool and way of skeletons, as the engine names them."""
    operations, pools, ways = set(), set(), set()
    for case in chain.from_iterable(made(group) for group in GROUPS):
        if case.program:
            length = len(case.target) - crafted.PROGRAM_OFFSET
            opened = body.open_body(case.program, crafted.PROGRAM_OFFSET, length)
            operations |= {(record.op, record.residual) for record in opened.records}
            pools |= {name for record in opened.records for name in residuals.pools_of(record)}
            ways.add(opened.skeleton[0])
    exact, listed, pooled, sparse = records.EXACT, records.EXCEPTIONS, records.POOL, records.SPARSE
    kinds = {
        **dict.fromkeys((records.QUANTISED, records.CODES), (exact, listed, pooled, sparse)),
        **dict.fromkeys((records.BIAS, records.RESCALED, records.CAST), (exact, listed, pooled)),
        **dict.fromkeys((records.FLOAT, records.PLAIN, records.STEPPED), (pooled,)),
        **dict.fromkeys((*records.ZEROING, *records.REDUCING), (exact, listed)),
    }
    wanted = {(op, kind) for op in range(len(records.NAMES)) for kind in kinds.get(op, (exact,))}
    assert operations == wanted
    assert pools == set(records.KINDS)
    assert ways == {0, 1, 2, 3, 4}


def outcome(run: Callable[[], bytes]) -> bytes | str:
    """What a decoder gives: bytes, or an error code."""
    try:
        return run()
    except Fault as fault:
        return fault.code
    except SluiceError as error:
        return errors_pb2.ErrorReason.Name(error.reason)


@pytest.mark.parametrize("group", GROUPS)
def test_both_decoders_say_the_same_of_damage(group: Callable[[], Iterator[Case]], tmp_path: Path) -> None:
    """Damage to programs behind right checksums, and to whole files."""
    random = np.random.default_rng(2)
    for case in made(group)[:8]:
        for _ in range(2):
            if case.program:
                damaged = bytearray(case.program)
                damaged[int(random.integers(0, min(90, len(damaged))))] ^= 1 << int(random.integers(0, 8))
                target = case.target[crafted.PROGRAM_OFFSET :]
                changed = crafted.wrapped(case.name, case.base, bytes(damaged), target)
            else:
                file = bytearray(case.delta)
                file[int(random.integers(0, len(file)))] ^= 1 << int(random.integers(0, 8))
                changed = replace(case, delta=bytes(file))
            mine = outcome(lambda changed=changed: decode(changed.base, changed.delta))
            assert mine == outcome(lambda changed=changed: applied(changed, tmp_path)), case.name
        cut = case.delta[: int(random.integers(0, len(case.delta)))]
        assert outcome(lambda cut=cut, case=case: decode(case.base, cut)) == "DELTA_TRUNCATED"


@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("make", [models.tiny_onnx, models.tiny_tflite])
def test_deltas_of_the_encoder(tmp_path: Path, make: Callable[..., Path], effort: str) -> None:
    old, new = make(tmp_path / "old", 1, hidden=48), make(tmp_path / "new", 2, hidden=48, change=0.01)
    for base in (old, None):
        delta.create(base, new, tmp_path / "d", options=delta.EncodeOptions(effort=effort))
        known = None if base is None else base.read_bytes()
        assert decode(known, (tmp_path / "d").read_bytes()) == new.read_bytes()


@pytest.mark.skipif(not SHARED_PAIRS.is_dir(), reason="real pairs: SLUICE_PAIRS names none")
@pytest.mark.parametrize("name", SMALL_PAIRS)
def test_deltas_of_real_pairs(tmp_path: Path, name: str) -> None:
    old, new = (next((SHARED_PAIRS / name).glob(f"{side}.*")) for side in ("old", "new"))
    delta.create(old, new, tmp_path / "d")
    assert decode(old.read_bytes(), (tmp_path / "d").read_bytes()) == new.read_bytes()


def test_the_command_line(tmp_path: Path) -> None:
    case = made(tensors)[0]
    (tmp_path / "base").write_bytes(case.base)
    (tmp_path / "delta").write_bytes(case.delta)
    command = [sys.executable, "-m", "edge_tests.conformance.plain"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60, "check": False}
    places = [str(tmp_path / "delta"), str(tmp_path / "out")]
    done = subprocess.run([*command, str(tmp_path / "base"), *places], **options)  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").read_bytes() == case.target
    (tmp_path / "out").unlink()
    done = subprocess.run([*command, "-", *places], **options)  # type: ignore[call-overload]
    assert done.returncode == 1
    assert done.stderr.startswith("DELTA_WRONG_BASE: ")
    assert not (tmp_path / "out").exists()


def test_the_plain_decoder_stands_alone() -> None:
    """It imports nothing of the engine, and no arrays; its numbers are the document's."""
    for path in sorted((Path(__file__).parent / "plain").glob("*.py")):
        text = path.read_text("utf-8")
        names = re.findall(r"^(?:from|import) ([\w.]+)", text, re.M)
        outside = {
            name.split(".")[0] for name in names if not name.startswith("edge_tests.conformance.plain")
        }
        assert outside <= ALLOWED_MODULES, path.name
    named = {name: value for name, value in vars(plain_limits).items() if name.isupper()}
    assert named == {name: getattr(limits, name) for name in named}
    assert FEATURES == container.FEATURES
    assert NAMES == records.NAMES
    assert {name: (kind.alphabet, kind.contexts) for name, kind in records.KINDS.items()} == {
        name: (alphabet, contexts) for name, alphabet, contexts in POOLS
    }


def test_every_float32_near_an_edge_is_cast_alike() -> None:
    """Conversions to and from 16 bits, against NumPy's."""
    edges = [
        0x33000000,
        0x33800000,
        0x387FC000,
        0x38800000,
        0x477FE000,
        0x7F800000,
        0x00800000,
        0,
        0x3F800000,
    ]
    words = np.unique([edge + step for edge in edges for step in range(-9000, 9000, 7) if edge + step >= 0])
    words = words[words <= 0x7F800000].astype("<u4")
    with np.errstate(all="ignore"):
        halves = words.view("<f4").astype("<f2").view("<u2")
    assert [to_half(int(word), clamped=False) for word in words] == halves.tolist()
    every = np.arange(1 << 16, dtype="<u2")
    every = every[~np.isnan(every.view("<f2"))]
    wide = every.view("<f2").astype("<f4").view("<u4")
    assert [widened(int(word), "f16") for word in every] == wide.tolist()
