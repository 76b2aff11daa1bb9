"""The chain of audit records: whatever is changed, removed, moved or cut off is found, and said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.audit_chain import START, Head, follow, parse_head, verify
from fleet.limits import AUDIT_RECORD_BYTES
from updater import canonical
from updater.errors import SluiceError


def chain(count: int, head: Head = START) -> tuple[list[bytes], list[Head]]:
    records, heads = [], []
    for number in range(count):
        data, head = follow(head, {"event": "call", "method": f"Registry.M{number}"})
        records.append(data)
        heads.append(head)
    return records, heads


RECORDS, HEADS = chain(8)


def broken(records: list[bytes], **how: object) -> str:
    with pytest.raises(SluiceError) as caught:
        verify(records, **how)  # type: ignore[arg-type]
    assert caught.value.code == "AUDIT_BROKEN"
    return caught.value.message


def test_a_whole_log_and_its_parts_hold() -> None:
    whole = verify(RECORDS)
    assert (whole.first, whole.head, whole.proven) == (1, HEADS[-1], ())
    assert verify(RECORDS, seen=[HEADS[3], HEADS[7]]).proven == (HEADS[3], HEADS[7])
    assert verify(RECORDS[5:], after=HEADS[4]).head == HEADS[-1]
    assert verify(RECORDS[5:]).first == 6  # what came before is kept elsewhere
    assert verify(RECORDS[5:], seen=[HEADS[1]]).proven == ()
    assert verify([]).head == START
    assert verify([], after=HEADS[2]).head == HEADS[2]


def test_what_was_done_to_it_is_said() -> None:
    assert "record 4 is missing" in broken(RECORDS[:3] + RECORDS[4:])
    assert "records 3 to 5 are missing" in broken(RECORDS[:2] + RECORDS[5:])
    assert "moved or repeated" in broken([*RECORDS[:3], RECORDS[2], *RECORDS[3:]])
    swapped = [*RECORDS[:2], RECORDS[3], RECORDS[2], *RECORDS[4:]]
    assert "record 3 is missing" in broken(swapped)
    altered = canonical.decode(RECORDS[3], "record") | {"method": "Registry.Other"}
    assert "record 5 does not follow record 4" in broken(
        [*RECORDS[:3], canonical.encode(altered), *RECORDS[4:]]
    )
    assert "line 4 is not a record" in broken([*RECORDS[:3], b"{}", *RECORDS[4:]])
    assert "line 4 is not a record" in broken([*RECORDS[:3], RECORDS[3] + b" ", *RECORDS[4:]])
    assert "line 1 is not a record" in broken([b"\xff"])
    assert "line 1 is longer" in broken([b"x" * (AUDIT_RECORD_BYTES + 1)])
    # The beginning is gone, where it must be there.
    assert "records 3 to 4 are missing" in broken(RECORDS[4:], after=HEADS[1])


def test_a_kept_head_finds_a_cut_end_and_a_chain_made_anew() -> None:
    assert "ends at record 5, and record 8 is known" in broken(RECORDS[:5], seen=[HEADS[7]])
    assert verify(RECORDS[:5], seen=[HEADS[4]]).head == HEADS[4]
    assert "ends at record 0" in broken([], seen=[HEADS[0]])
    changed, head = follow(HEADS[2], {"event": "call", "method": "Registry.Other"})
    forged = RECORDS[:3] + [changed] + chain(4, head)[0]
    assert verify(forged).head.sequence == 8  # by itself it is whole
    assert "record 8 is not the one that was there" in broken(forged, seen=[HEADS[7]])
    assert "record 6 does not follow record 5" in broken(forged[5:], after=HEADS[4])


@given(st.integers(0, len(RECORDS) - 1), st.data())
def test_no_bit_of_a_log_whose_head_is_kept_can_be_flipped(index: int, data: st.DataObject) -> None:
    record = bytearray(RECORDS[index])
    bit = data.draw(st.integers(0, 8 * len(record) - 1))
    record[bit // 8] ^= 1 << bit % 8
    broken([*RECORDS[:index], bytes(record), *RECORDS[index + 1 :]], seen=[HEADS[-1]])


@given(st.lists(st.sampled_from(RECORDS), max_size=10))
def test_no_other_selection_of_records_holds(records: list[bytes]) -> None:
    is_run = any(records == RECORDS[start : start + len(records)] for start in range(len(RECORDS)))
    if is_run:
        assert verify(records).head in (START, *HEADS)
    else:
        broken(records)


def test_a_head_is_written_and_read() -> None:
    assert parse_head(str(HEADS[4])) == HEADS[4]
    for text in ("", "4", "4:abc", f"x:{HEADS[4].digest}", f"-1:{HEADS[4].digest}"):
        with pytest.raises(SluiceError) as caught:
            parse_head(text)
        assert caught.value.code == "REQUEST_INVALID"


def test_no_record_is_longer_than_a_record_may_be() -> None:
    with pytest.raises(SluiceError) as caught:
        follow(START, {"event": "x" * AUDIT_RECORD_BYTES})
    assert caught.value.code == "LIMIT_EXCEEDED"
