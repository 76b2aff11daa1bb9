"""Open Inference datatypes, NumPy dtypes and raw contents."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.datatypes import BF16, BYTES, DATATYPES, bytes_elements, decode, encode, of_dtype, to_dtype
from runtimes.interface import InputInvalid

FIXED = [datatype for datatype in DATATYPES if datatype != BYTES]


@pytest.mark.parametrize("datatype", FIXED)
def test_round_trip_of_numbers(datatype):
    dtype = to_dtype(datatype)
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    raw = encode(array)
    assert len(raw) == 6 * dtype.itemsize
    again = decode(datatype, [2, 3], raw)
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, array)


def test_contents_are_little_endian():
    assert decode("INT32", [1], b"\x01\x02\x00\x00").tolist() == [513]
    assert encode(np.array([513], "<i4")) == b"\x01\x02\x00\x00"


def test_numbers_are_not_copied():
    raw = bytes(1 << 20)
    array = decode("UINT8", [1 << 20], raw)
    assert not array.flags.owndata
    assert not array.flags.writeable


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_round_trip_of_bytes(elements):
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    assert decode(BYTES, [len(elements)], encode(array)).tolist() == elements


def test_bytes_on_the_wire():
    array = np.array([[b"ab", "é"]], np.object_)
    raw = struct.pack("<I", 2) + b"ab" + struct.pack("<I", 2) + "é".encode()
    assert encode(array) == raw
    assert decode(BYTES, (1, 2), raw).shape == (1, 2)


def test_scalars_and_empty_tensors():
    assert decode("FP32", [], struct.pack("<f", 1.5)).item() == 1.5
    assert decode("FP32", [0, 7], b"").shape == (0, 7)
    assert decode(BYTES, [0], b"").shape == (0,)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "words"),
    [
        ("FP32", [2], b"\0" * 7, ["FP32", "[2]", "8 bytes", "not 7"]),
        ("FP32", [2], b"\0" * 9, ["8 bytes", "not 9"]),
        ("FP32", [-1], b"\0" * 4, ["negative"]),
        ("FP32", [2**40, 2**40], b"\0" * 4, ["not 4"]),
        ("BOOL", [2], b"\x00\x02", ["BOOL"]),
        ("FP8", [1], b"\0", ["'FP8'", "FP32"]),
        ("", [1], b"\0", ["''"]),
        (BYTES, [2**50], b"\0" * 8, ["does not fit in 8"]),
        (BYTES, [1], struct.pack("<I", 5) + b"abc", ["element 0", "claims 5", "3 are left"]),
        (BYTES, [2], struct.pack("<I", 6) + b"abcdef", ["ends before its element 1"]),
        (BYTES, [1], struct.pack("<I", 1) + b"abc", ["followed by 2 bytes"]),
    ],
)
def test_contents_that_do_not_fit(datatype, shape, raw, words):
    with pytest.raises(InputInvalid) as caught:
        decode(datatype, shape, raw)
    for word in words:
        assert word in str(caught.value)


@given(st.sampled_from(DATATYPES), st.lists(st.integers(-2, 5), max_size=3), st.binary(max_size=64))
def test_any_contents_are_decoded_or_refused(datatype, shape, raw):
    try:
        array = decode(datatype, shape, raw)
    except InputInvalid:
        return
    assert list(array.shape) == shape
    assert encode(array) == raw


def test_dtypes_without_a_datatype():
    assert of_dtype(np.dtype(np.complex64)) == ""
    assert of_dtype(np.dtype(">f4")) == ""
    assert of_dtype(np.dtype("S3")) == BYTES
    assert of_dtype(np.dtype(np.uint16)) == "UINT16"
    assert to_dtype(BF16) == np.dtype(np.uint16)
    with pytest.raises(InputInvalid, match="complex64"):
        encode(np.zeros(1, np.complex64))


def test_elements_must_be_bytes_or_text():
    assert bytes_elements(np.array(["a", b"b"], np.object_)).tolist() == [b"a", b"b"]
    assert bytes_elements(np.array("x")).item() == b"x"
    with pytest.raises(InputInvalid, match=r"element 1 .* NoneType"):
        bytes_elements(np.array([b"a", None], np.object_))
