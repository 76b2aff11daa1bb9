"""A short run of the fuzzer, and the kept inputs again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_tests.conformance.vectors import build
from edge_tests.fuzz import corpus
from edge_tests.fuzz.choices import Choices
from edge_tests.fuzz.deltas import Case, case_of, put_together, samples
from edge_tests.fuzz.examine import BrokenWordError, examine, workplace
from edge_tests.fuzz.files import examine_file
from edge_tests.fuzz.files import seeds as files
from edge_tests.fuzz.requests import examine_request, seeds
from updater import delta
from updater.formats.stored_zip import Entry

PARTS = 4  # of the corpus, so that workers share it
MEASURED = 5  # every so many kept inputs memory is measured, which takes its time


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with workplace() as found:
        yield found


@pytest.mark.parametrize("part", range(PARTS))
def test_kept_inputs(directory: Path, part: int) -> None:
    codes: Counter[str] = Counter()
    for number, data in enumerate(corpus.load()[part::PARTS]):
        codes[examine(case_of(data), directory, memory=number % MEASURED == 0).code] += 1
    assert codes["right"] or codes["DELTA_TARGET_MISMATCH"]
    assert codes["DELTA_INVALID"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=4, max_size=corpus.INPUT_BYTES))
def test_new_inputs(directory: Path, data: bytes) -> None:
    examine(case_of(data), directory)


def test_valid_vectors_keep_within_bounds(directory: Path) -> None:
    for sample in samples():
        case = Case(sample.base, put_together(sample.header, list(sample.blocks)))
        assert examine(case, directory, memory=True).code == "right"


def test_the_corpus_is_small() -> None:
    assert corpus.FILE.stat().st_size <= corpus.MOST_BYTES
    assert len(corpus.load()) == len(set(corpus.load())) > 50


def test_a_decoder_that_breaks_its_word_is_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fuzzer holds against the decoder, each made true once."""
    case = Case(b"x" * 20, build.one_block(b"x" * 20, b"x" * 9, build.payload(build.copy(0, 9))))
    assert examine(case, directory).code == "right"

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("updater.delta.applier.decode_block", crash)
        with pytest.raises(ZeroDivisionError):
            examine(case, directory)
    with monkeypatch.context() as patch:
        patch.setattr("edge_tests.fuzz.examine.SECONDS", 0)
        patch.setattr("edge_tests.fuzz.examine.SECONDS_A_KIBIBYTE", 0)
        with pytest.raises(BrokenWordError, match="s for a target"):
            examine(case, directory)
    with monkeypatch.context() as patch:
        patch.setattr("edge_tests.fuzz.examine.MEMORY_BYTES", 100)
        patch.setattr("edge_tests.fuzz.examine.MEMORY_EXPANSION", 1)
        with pytest.raises(BrokenWordError, match="MiB for a target"):
            examine(case, directory, memory=True)
    with monkeypatch.context() as patch:
        patch.setattr(delta.Applier, "finish", lambda self: "sha256:" + "0" * 64)
        with pytest.raises(BrokenWordError, match="another target"):
            examine(case, directory)
    assert list(directory.iterdir()) == []


def test_choices_end_in_first_ones() -> None:
    choices = Choices(b"")
    assert (choices.below(7), choices.number(), choices.signed(), choices.rarely()) == (0, 0, 0, False)
    assert choices.bytes(3) == bytes(3)
    seen = {Choices(bytes([kind, step])).number() for kind in range(224, 256) for step in range(5)}
    assert {(1 << 64) - 1, 1 << 63, 1 << 31} <= seen


def test_requests_to_begin_with() -> None:
    assert Counter(map(examine_request, seeds()))["read"] >= len(seeds()) - 3  # BYTES, and no region


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_requests(data: st.DataObject) -> None:
    blob = bytearray(data.draw(st.sampled_from(seeds())))
    for _ in range(data.draw(st.integers(0, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    at = data.draw(st.integers(0, len(blob)))
    examine_request(bytes(blob[:at]) + data.draw(st.binary(max_size=8)) + bytes(blob[at:]))


def test_files_to_begin_with() -> None:
    found = Counter(map(examine_file, files()))
    assert found["entries"] == 3
    assert found["read"] >= 5
    assert not found["refused"]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_files(data: st.DataObject) -> None:
    blob = bytearray(data.draw(st.sampled_from(files())))
    for _ in range(data.draw(st.integers(0, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(
            st.sampled_from((0, 1, 127, 128, 254, 255))
        )
    at = data.draw(st.integers(0, len(blob)))
    examine_file(bytes(blob[:at]) + data.draw(st.binary(max_size=8)) + bytes(blob[at:]))


def test_a_reader_that_goes_beyond_its_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("updater.formats.stored_zip.entries", lambda data: (Entry("w", 0, len(data) + 1),))
    with pytest.raises(BrokenWordError, match="outside"):
        examine_file(files()[-1])


def test_a_front_that_reads_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.messages._ID_TAG", 0x0A)  # the model's name taken for the id
    with pytest.raises(BrokenWordError, match="another id"):
        examine_request(seeds()[0])
