"""The bytes between arrays: coded along the base, with a window where they have most in common with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from updater import delta, limits
from updater.delta.program import skeleton, tracking, windows
from updater.delta.program.arithmetic import Coder, decisions
from updater.delta.program.body import Place
from updater.delta.program.records import F32, FLOAT, Record
from updater.delta.program.windows import Ranges

RANDOM = np.random.default_rng(5)


def graph(prefix: bytes, count: int = 60) -> bytes:
    """Nodes as in a graph: names behind their lengths, in nodes behind theirs."""
    out = b""
    for node in range(count):
        kinds = (b"weight", b"bias", b"Mul_output_%d" % (node * node % 7))
        names = [prefix + b"encoder.%d.%s" % (node * 37 % 101, kind) for kind in kinds]
        inside = b"".join(bytes([10, len(name)]) + name for name in names)
        out += bytes([18, len(inside)]) + inside
    return out


def modelled(code: object, base: bytes, target: bytes) -> int:
    coder = Coder(limit=250, budget=decisions(len(target)))
    assert callable(code)
    code(coder, base, len(target), target)
    sent = coder.finish()
    again = Coder(sent, 250, decisions(len(target)))
    assert code(again, base, len(target), None) == target
    again.end()
    return len(sent)


@pytest.mark.parametrize(
    ("old", "new"), [(b"If_0.then_branch.", b""), (b"", b"model."), (b"model.", b"the.model.")]
)
def test_names_that_grew_or_shrank_cost_little_along_the_base(old: bytes, new: bytes) -> None:
    base, target = graph(old), graph(new)
    sizes = {module: modelled(module.code, base, target) for module in (tracking, skeleton)}
    assert sizes[tracking] < 0.5 * sizes[skeleton]
    assert sizes[tracking] < len(target) / 20


@pytest.mark.parametrize("edge", [0, 1, 5, 6, 7, 300])
def test_any_bytes_come_back_along_any_base(edge: int) -> None:
    noise = RANDOM.bytes(300)
    for target in (b"x", noise[:40], graph(b"", 3), noise[:9] * 9, graph(b"a.", 2) + noise[100:150]):
        modelled(tracking.code, (graph(b"b.", 3) + noise)[:edge], target)


def test_a_delta_names_the_way_that_it_uses(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(graph(b"If_0.then_branch.", 20))
    (tmp_path / "new").write_bytes(graph(b"", 20))
    delta.create(tmp_path / "old", tmp_path / "new", tmp_path / "d")
    assert b"\x08tracking" in (tmp_path / "d").read_bytes()[:200]


def test_a_window_lies_where_base_and_skeleton_have_most_in_common() -> None:
    arrays = [RANDOM.bytes(300_000), RANDOM.bytes(400_000)]
    text = graph(b"model.")
    base = np.frombuffer(arrays[0] + text + arrays[1], dtype=np.uint8)
    place = Place(0, 20_000, 0, len(base))
    found = windows.others(base, windows.arrays_of([]), place, [], text[500:] + RANDOM.bytes(99))
    assert len(found) == 1
    start, length = found[0].window_start, found[0].window_length
    assert length <= limits.MAX_MODEL_WINDOW_BYTES
    assert 300_000 <= start <= 300_510
    assert start + length >= 300_000 + len(text) - 8


def test_no_window_is_longer_than_the_one_given() -> None:
    base = np.frombuffer(graph(b"model.") * 40, dtype=np.uint8)
    place = Place(0, 20_000, 7, 5_000)
    for other in windows.others(base, windows.arrays_of([]), place, [], graph(b"model.")[:3000]):
        assert other.window_length <= 5_000
        assert 0 <= other.window_start <= len(base) - other.window_length


def test_a_window_of_nothing_but_what_records_read_leaves_one_elsewhere() -> None:
    read, text = RANDOM.bytes(400_000), graph(b"model.")
    base = np.frombuffer(text + read, dtype=np.uint8)
    place = Place(0, 20_000, len(text) + 80_000, 200_000)
    record = Record(FLOAT, F32, 0, len(read) // 4, base=len(text))
    (found,) = windows.others(base, windows.arrays_of([]), place, [record], text[500:])
    assert found.window_start + found.window_length <= len(text)
    assert found.window_length >= len(text) - 520


def test_ranges_count_the_bytes_before_a_place() -> None:
    ranges = Ranges.of([(10, 20), (15, 30), (40, 45), (50, 50)])
    assert list(zip(ranges.starts, ranges.ends)) == [(10, 30), (40, 45)]
    places = np.array([0, 10, 11, 30, 35, 40, 44, 45, 99])
    assert ranges.before(places).tolist() == [0, 0, 1, 20, 20, 20, 24, 25, 25]
    outside = ranges.outside(60)
    assert list(zip(outside.starts, outside.ends)) == [(0, 10), (30, 40), (45, 60)]
    assert Ranges.of([]).before(places).tolist() == [0] * 9


@pytest.mark.parametrize("prefix", [b"", b"model.branch."])
def test_a_graph_beside_large_arrays_is_coded_along_the_base(tmp_path: Path, prefix: bytes) -> None:
    arrays = RANDOM.bytes(400_000)
    (tmp_path / "old").write_bytes(arrays + graph(b"If_0.then_branch."))
    (tmp_path / "new").write_bytes(graph(prefix))
    options = delta.EncodeOptions(effort="max", threads=1)
    made = delta.create(tmp_path / "old", tmp_path / "new", tmp_path / "d", options=options)
    delta.apply(tmp_path / "old", tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == graph(prefix)
    assert made.delta_size < 400 + len(graph(prefix)) / 30
