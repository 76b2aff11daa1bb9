"""Peers rebuild what they encode, or have no size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import decoding, ours, peers
from benchmarks.peers import Peer, Program
from benchmarks.xor_planes import XorPlanes, aligned_tensors, outside
from edge_tests.harness.models import tiny_onnx
from updater import delta
from updater.formats import read_model

needs_zstd = pytest.mark.skipif(bool(XorPlanes().missing()), reason=XorPlanes().missing())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "old.onnx", tmp_path / "new.onnx"
    return tiny_onnx(old, hidden=4096), tiny_onnx(new, hidden=4096, change=1e-4)


@needs_zstd
def test_xor_of_planes_beats_the_file_on_tuned_floats(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    tensors = aligned_tensors(peers.spans(old), peers.spans(new))
    assert read_model(new).size - sum(item[2] for item in tensors) < 4096
    measured = XorPlanes().measure(old, new, tmp_path)
    assert measured.patch_bytes < new.stat().st_size * 0.7


@needs_zstd
@pytest.mark.parametrize("sizes", [(0, 10), (10, 0), (5000, 70_000), (70_000, 5000)])
def test_xor_of_planes_takes_any_two_files(tmp_path: Path, sizes: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    old, new = tmp_path / "old", tmp_path / "new"
    content = random.integers(0, 256, max(sizes), dtype=np.uint8).tobytes()
    old.write_bytes(content[: sizes[0]])
    new.write_bytes(content[: sizes[1]])
    measured = XorPlanes().measure(old, new, tmp_path)
    if sizes[0] >= sizes[1]:
        assert measured.patch_bytes < 200  # all of it lies in the base


def test_outside_covers_what_tensors_leave() -> None:
    assert outside(10, [(0, 2, 3, 1), (0, 5, 1, 1)]) == [(0, 2), (5, 5), (6, 10)]


def test_a_wrong_result_has_no_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Liar(Peer):
        name = "liar"

        def missing(self) -> str:
            return ""

        def encode(self, old: Path, new: Path, patch: Path) -> None:
            patch.write_bytes(b"")

        def decode(self, old: Path, patch: Path, out: Path) -> None:
            out.write_bytes(old.read_bytes())

    with pytest.raises(RuntimeError, match="wrongly"):
        Liar().measure(*pair, tmp_path)


def test_a_program_that_is_not_there_says_what_installs_it() -> None:
    absent = Program("x", "some-package", "no-such-program {old}", "cat {patch}")
    assert absent.missing() == "no-such-program not found: apt-get install some-package"


def test_a_program_that_fails_says_why(pair: tuple[Path, Path], tmp_path: Path) -> None:
    failing = Program("x", "coreutils", "ls --no-such-option {old}", "ls {patch}")
    with pytest.raises(RuntimeError, match="ls ended with 2"):
        failing.measure(*pair, tmp_path)


def test_ours_is_measured_like_a_peer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    measured = ours.Sluice("default").measure(*pair, tmp_path)
    assert 0 < measured.patch_bytes < pair[1].stat().st_size
    assert measured.decode_anon_bytes is not None
    assert measured.decode_anon_bytes > 1 << 20  # an interpreter with NumPy


def test_a_decode_that_fails_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    delta.create(old, new, tmp_path / "delta")
    with pytest.raises(RuntimeError, match="DELTA_WRONG_BASE"):
        decoding.decode(new, tmp_path / "delta", tmp_path / "out")
