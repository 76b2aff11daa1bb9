"""The page of `sluice delta describe --html`, and its treemap."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_tests.harness.command import sluice
from edge_tests.harness.models import layers, tiny_onnx, write_onnx
from fleet.cli.delta_page import MAX_TILES, _label, page
from fleet.cli.treemap import Rectangle, treemap

HOSTILE = "</title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00"


class Reader(HTMLParser):
    """What the page holds: its tags, its text, and the rows of the table of regions."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self._table = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._inside.append(tag)
        if tag == "table":
            self._table = found.get("id") or "other"
        if self._table == "regions" and tag == "tr":
            self.rows.append([])
        if self._table == "regions" and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts.append(data)
        elif self._table == "regions" and self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = ""
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass


def svgs(text: str) -> list[ElementTree.Element]:
    """The pictures, each of which must be well-formed."""
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def region(name: str, coded: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "base_name": name,
        "instruction": "tensor",
        "predictor": "difference",
        "dtype": "float32",
        "shape": [4, 8],
        "target_offset": 0,
        "target_length": 128,
        "coded_bytes": coded,
        **more,
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        tiny_onnx(tmp_path / "old.onnx", hidden=256),
        tiny_onnx(tmp_path / "new.onnx", hidden=256, change=1e-3),
    )


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_every_region_is_in_the_table_and_sizes_add_up(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "d.html"
    told = sluice("delta", "describe", *pair, "--html", out, "--json").expect().document
    text = out.read_text("utf-8")
    head, *rows, foot = Reader(text).rows
    assert head[0] == "region"
    names = {row[0] for row in rows}
    assert {entry["name"] or "(between tensors)" for entry in told["regions"]} <= names
    assert len(rows) - len(told["regions"]) in (0, 1)  # the row of what no region accounts for
    assert sum(number(row[6]) for row in rows) == told["delta_size"] == number(foot[6])
    assert sum(number(row[5]) for row in rows) == told["target_size"] == number(foot[5])
    assert 99 <= sum(float(row[8].removesuffix(" %")) for row in rows) <= 101
    (weights,) = (row for row in rows if row[0] == "weights0")
    assert float(weights[7]) == pytest.approx(8 * number(weights[6]) / (8 * 256), abs=0.005)
    assert "old.onnx → new.onnx" in text


def test_the_page_needs_nothing_else_and_lets_nothing_in(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "d.html"
    sluice("delta", "describe", *pair, "--html", out).expect()
    found = Reader(out.read_text("utf-8"))
    links = [(tag, key) for tag, attributes in found.tags for key in attributes if key in ("src", "href")]
    assert not links
    assert "http:" not in out.read_text("utf-8").replace("http-equiv", "")
    (policy,) = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = found.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_picture_is_told_to_those_who_do_not_see_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "d.html"
    sluice("delta", "describe", *pair, "--html", out).expect()
    picture, bars, *_ = svgs(out.read_text("utf-8"))
    assert picture.get("role") == bars.get("role") == "img"
    assert "weights0" in (picture.findtext("desc") or "")
    assert bars.get("aria-label")
    tiles = picture.findall("g")
    assert tiles
    assert all(tile.findtext("title") for tile in tiles)


def test_names_from_a_file_are_text_and_nothing_else(tmp_path: Path) -> None:
    files = []
    for change in (0.0, 1e-3):
        (weights, bias), _ = layers(1, hidden=64, change=change)
        files.append(
            write_onnx(
                tmp_path / f"{change}.onnx",
                [helper.make_node("Gemm", ["x", HOSTILE, "b"], ["y"])],
                inputs={"x": (TensorProto.FLOAT, ["batch", 8])},
                outputs={"y": (TensorProto.FLOAT, ["batch", 64])},
                constants=[numpy_helper.from_array(weights, HOSTILE), numpy_helper.from_array(bias, "b")],
            )
        )
    out = tmp_path / "d.html"
    sluice("delta", "describe", *files, "--html", out).expect()
    text = out.read_text("utf-8")
    found = Reader(text)
    assert len(found.scripts) == 1
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert "\u202e" not in text
    assert "\x00" not in text
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd")
    assert shown in {row[0] for row in found.rows}
    assert svgs(text)


@given(st.lists(st.tuples(st.text(max_size=600), st.integers(0, 10**7)), max_size=MAX_TILES * 2))
@settings(max_examples=40, deadline=None)
def test_any_names_and_sizes_make_a_page(found: list[tuple[str, int]]) -> None:
    regions = [region(name, coded, base_name=name[::-1]) for name, coded in found]
    size = sum(coded for _, coded in found) + 30
    read = Reader(page("a → b", size, 128 * len(found), regions))
    assert len(read.rows) == len(found) + 3  # heading, what no region accounts for, the sum
    assert sum(number(row[6]) for row in read.rows[1:-1]) == size
    assert len(read.scripts) == 1


def test_a_full_copy_and_an_empty_file_have_a_page(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out, empty = tmp_path / "d.html", tmp_path / "empty"
    sluice("delta", "describe", "-", pair[1], "--html", out).expect()
    assert "new.onnx, a full copy" in out.read_text("utf-8")
    empty.write_bytes(b"")
    sluice("delta", "describe", pair[0], empty, "--html", out).expect()
    assert Reader(out.read_text("utf-8")).rows


def test_the_page_never_replaces_an_input(pair: tuple[Path, Path]) -> None:
    before = pair[1].read_bytes()
    assert "is one of the inputs" in sluice("delta", "describe", *pair, "--html", pair[1]).expect(2).err
    assert pair[1].read_bytes() == before


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_tiles_fill_the_area_by_weight_without_overlap(weights: list[int]) -> None:
    weights.sort(reverse=True)
    area = Rectangle(0, 0, 960, 460)
    tiles = treemap(weights, area)
    assert len(tiles) == len(weights)
    scale = 960 * 460 / sum(weights)
    for weight, tile in zip(weights, tiles, strict=True):
        assert tile.width * tile.height == pytest.approx(weight * scale, rel=1e-6, abs=1e-6)
        assert -1e-6 <= tile.x <= tile.x + tile.width <= 960 + 1e-6
        assert -1e-6 <= tile.y <= tile.y + tile.height <= 460 + 1e-6
    for index, one in enumerate(tiles):
        for other in tiles[index + 1 :]:
            wide = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
            high = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
            assert wide <= 1e-6 or high <= 1e-6


@pytest.mark.parametrize("columns", range(6, 24))
def test_no_line_of_a_label_is_a_mark_alone(columns: int) -> None:
    name = "dense2.weights_quantized/scale_x"
    lines = [text for text, kind in _label(name, "1 B", columns, 40) if kind == "b"]
    assert "".join(lines) == name
    assert all(0 < len(text) <= columns for text in lines)
    assert not {"_", ".", "/"} & set(lines)


def test_what_is_left_of_a_name_tells_something_or_is_left_out() -> None:
    assert _label("onnx::MatMul_724_quantized", "1 B", 6, 1) == []
    assert _label("onnx::MatMul_quantized", "1 B", 10, 1) == [("…uantized", "b")]
    assert _label("layer.0.weights_quantized.x", "1 B", 10, 1) == []
    assert _label("116 more", "1 B", 6, 3) == [("116 ", "b"), ("more", "b"), ("1 B", "s")]
