"""The structural check of TensorFlow Lite files: whole files pass, and damage is named."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_tests.harness.fixtures import CONFORMANCE
from edge_tests.harness.models import tiny_tflite
from runtimes.interface import ModelRejected
from runtimes.tflite_file import verify

WHOLE = (CONFORMANCE / "affine.tflite").read_bytes()


@pytest.mark.parametrize("path", sorted(CONFORMANCE.glob("*.tflite")), ids=lambda path: path.stem)
def test_whole_files_pass(path):
    verify(path)


def test_every_cut_is_found(tmp_path):
    path = tmp_path / "cut"
    for keep in range(len(WHOLE)):
        path.write_bytes(WHOLE[:keep])
        with pytest.raises(ModelRejected, match="not a whole TensorFlow Lite file") as caught:
            verify(path)
        assert str(path) in str(caught.value)


def test_a_cut_says_where_the_file_ends(tmp_path):
    path = tiny_tflite(tmp_path / "model", hidden=512)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelRejected, match=rf"the file ends at {len(data) // 2} "):
        verify(path)


@given(position=st.integers(8, len(WHOLE) - 4), value=st.integers(0, 2**32 - 1))
def test_any_damage_is_passed_or_refused(tmp_path_factory, position, value):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(WHOLE[:position] + struct.pack("<I", value) + WHOLE[position + 4 :])
    try:
        verify(path)
    except ModelRejected:
        return


def test_tables_that_share_their_content_do_not_multiply(tmp_path):
    """2,000 offsets to one subgraph, which has 2,000 offsets to one tensor: four million visits."""
    count = 2000
    data = bytearray(b"\0\0\0\0TFL3")

    def put(raw: bytes) -> int:
        data.extend(bytes(-len(data) % 4))
        data.extend(raw)
        return len(data) - len(raw)

    def table(field: int, target: int | None) -> int:
        """A table with one offset field, or none, and its layout before it; offsets point forward."""
        slots = [0] * field + [4]
        layout = put(struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), 8, *slots))
        place = put(struct.pack("<iI", 0, 0))
        struct.pack_into("<i", data, place, place - layout)
        if target is not None:
            struct.pack_into("<I", data, place + 4, target - place - 4)
        return place

    def vector(start: int, target: int) -> None:
        struct.pack_into("<I", data, start, count)
        for index in range(count):
            place = start + 4 + 4 * index
            struct.pack_into("<I", data, place, target - place)

    model = table(2, None)
    subgraphs = put(bytes(4 + 4 * count))
    struct.pack_into("<I", data, model + 4, subgraphs - model - 4)
    subgraph = table(0, None)
    tensors = put(bytes(4 + 4 * count))
    struct.pack_into("<I", data, subgraph + 4, tensors - subgraph - 4)
    empty_layout = put(struct.pack("<2H", 4, 4))
    tensor = put(struct.pack("<i", 0))
    struct.pack_into("<i", data, tensor, tensor - empty_layout)
    vector(subgraphs, subgraph)
    vector(tensors, tensor)
    struct.pack_into("<I", data, 0, model)
    path = tmp_path / "bomb"
    path.write_bytes(data)
    with pytest.raises(ModelRejected, match="more than 250000 tables"):
        verify(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x08\x08\x12\x05sluice model")
    with pytest.raises(ModelRejected, match="not b'TFL3'"):
        verify(path)
    path.write_bytes(b"")
    with pytest.raises(ModelRejected, match="empty"):
        verify(path)
    with pytest.raises(ModelRejected, match="cannot be read"):
        verify(tmp_path / "nowhere")


def test_a_vector_longer_than_the_file_is_found(tmp_path):
    """The weights' buffer claims more bytes than there are."""
    weights = np.float32([-5, -2, 1, 4]).tobytes()  # the first row, as the file keeps it
    start = WHOLE.index(weights) - 4
    path = tmp_path / "x"
    path.write_bytes(WHOLE[:start] + struct.pack("<I", 2**31) + WHOLE[start + 4 :])
    with pytest.raises(ModelRejected, match=r"field 0 of the Buffer table .* reaches to byte"):
        verify(path)
