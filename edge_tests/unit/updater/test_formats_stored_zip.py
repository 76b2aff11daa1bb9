"""Zip files whose entries are stored: found where the standard library puts them, and no damage does harm."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from updater.formats import limits, stored_zip
from updater.formats.stored_zip import Entry


def archive(contents: dict[str, bytes], packed: tuple[str, ...] = (), comment: bytes = b"") -> bytes:
    """A zip file; the entries named in `packed` are compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in contents.items():
            way = zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(name), content, compress_type=way)
        file.comment = comment
    return out.getvalue()


CONTENTS = {"model/data/0": b"weights" * 40, "model/code.py": b"code" * 80, "model/data/1": b"biases" * 9}
SAMPLE = archive(CONTENTS, packed=("model/code.py",), comment=b"PK\x05 no record")


def entries(data: bytes) -> tuple[Entry, ...]:
    return stored_zip.entries(memoryview(data))


def test_stored_entries_are_found_without_their_common_directory() -> None:
    found = entries(SAMPLE)
    assert [entry.name for entry in found] == ["data/0", "data/1"]
    for entry in found:
        assert SAMPLE[entry.offset : entry.offset + entry.length] == CONTENTS[f"model/{entry.name}"]


def test_names_stay_whole_where_entries_lie_in_no_common_directory() -> None:
    assert [entry.name for entry in entries(archive({"one/a": b"1", "b": b"2"}))] == ["one/a", "b"]


def test_arrays_of_npz_are_entries() -> None:
    out = io.BytesIO()
    np.savez(out, weights=np.arange(9, dtype=np.float32))
    assert [entry.name for entry in entries(out.getvalue())] == ["weights.npy"]


def test_an_entry_with_its_sizes_in_the_zip64_field_is_found() -> None:
    data = bytearray(archive({"x": b"content"}))
    central = data.index(b"PK\x01\x02")
    wide = struct.pack("<2H2Q", 1, 16, 7, 7)
    struct.pack_into("<2L", data, central + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", data, central + 30, len(wide))
    data[central + 47 : central + 47] = wide
    end = data.index(b"PK\x05\x06")
    struct.pack_into("<L", data, end + 12, end - central)
    (entry,) = entries(bytes(data))
    assert data[entry.offset : entry.offset + entry.length] == b"content"


def test_entries_that_overlap_are_dropped() -> None:
    data = bytearray(archive({"one": b"1" * 50, "two": b"2" * 50}))
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    struct.pack_into("<L", data, second + 42, 0)  # both entries' local header is the first
    assert [entry.name for entry in entries(bytes(data))] == ["one"]


def test_an_entry_that_ends_beyond_the_file_is_dropped() -> None:
    data = bytearray(archive({"one": b"1" * 50}))
    struct.pack_into("<2L", data, data.index(b"PK\x01\x02") + 20, 1 << 20, 1 << 20)
    assert entries(bytes(data)) == ()


def test_a_count_beyond_the_directory_reads_no_further() -> None:
    data = bytearray(SAMPLE)
    struct.pack_into("<2H", data, data.index(b"PK\x05\x06") + 8, 0xFFFF, 0xFFFF)
    assert entries(bytes(data)) == entries(SAMPLE)


def test_entries_are_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(limits, "MAX_TENSORS", 2)
    assert len(entries(archive({str(number): b"x" for number in range(5)}))) == 2


def test_cut_anywhere_it_has_no_entries() -> None:
    for length in range(len(SAMPLE) - len(b"PK\x05 no record") - 4):
        assert entries(SAMPLE[:length]) == ()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.binary(max_size=8),
)
def test_changed_anywhere_its_entries_lie_inside_the_file(
    changes: list[tuple[int, int]], tail: bytes
) -> None:
    data = bytearray(SAMPLE)
    for place, value in changes:
        data[place] = value
    end = 0
    for entry in entries(bytes(data) + tail):
        assert entry.offset >= end
        assert entry.length > 0
        end = entry.offset + entry.length
    assert end <= len(data) + len(tail)
