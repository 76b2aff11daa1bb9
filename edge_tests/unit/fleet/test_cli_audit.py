"""`sluice operator` and `sluice audit` against a real control plane, and over exported files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_tests.harness.command import sluice
from edge_tests.harness.control import ControlPlane
from fleet.cli import heads
from fleet.cli.audit import _rows


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("audit") / "control", "--disk-reserve-bytes", "0") as one:
        yield one


@pytest.fixture(autouse=True)
def _environment(control: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CONTROL", control.address)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_roles_are_given_listed_and_taken_away(control: ControlPlane) -> None:
    assert sluice("operator", "roles").expect().out == "no operator has an entry\n"
    assert sluice("operator", "role", "ann", "viewer").expect().out == "ann: viewer\n"
    sluice("operator", "role", "bob", "admin").expect()
    found = sluice("operator", "roles", "--json").expect().document["operators"]
    assert [(entry["name"], entry["role"]) for entry in found] == [("ann", "viewer"), ("bob", "admin")]
    assert found[0]["change_time"].endswith("Z")
    assert "bob" in sluice("operator", "roles").expect().out
    assert "ann has no entry" in sluice("operator", "role", "ann", "--remove").expect().out
    assert sluice("operator", "role", "bob", "--remove", "--json").expect().document == {
        "operator": {"name": "bob", "role": None}
    }
    sluice("operator", "role", "ann").expect(2)
    sluice("operator", "role", "ann", "king").expect(2)
    sluice("operator", "role", "ann", "admin", "--remove").expect(2)
    assert "REQUEST_INVALID" in sluice("operator", "role", "a/b", "admin").expect(3).err


def test_the_list_shows_calls_with_their_outcome(control: ControlPlane) -> None:
    sluice("operator", "role", "ann", "viewer").expect()
    sluice("device", "label", "nowhere", "a=b").expect(4)
    lines = sluice("audit", "list", "--newest", 4).expect().out.splitlines()
    assert lines[0].split() == ["TIME", "WHO", "WHAT", "ON", "OUTCOME"]
    assert [(row.split()[2], row.split()[3], row.split()[-1]) for row in lines[1:]] == [
        ("operator/tester", "SetRole", "OK"),
        ("operator/tester", "LabelDevice", "DEVICE_UNKNOWN"),
    ]
    assert "nowhere set=a=b" in lines[2]
    half = sluice("audit", "list", "--newest", 1).expect().out.splitlines()[1].split()
    assert half[2:5] == ["-", "LabelDevice", "record"]
    records = sluice("audit", "list", "--newest", 2, "--json").expect().document["records"]
    assert [record["event"] for record in records] == ["call", "outcome"]
    assert sluice("audit", "list", "--denied").expect().out == "nothing\n"


def test_an_export_is_verified_without_a_server_and_damage_is_found(
    control: ControlPlane, tmp_path: Path
) -> None:
    for role in ("viewer", "publisher", "operator"):
        sluice("operator", "role", "ann", role).expect()
    file = tmp_path / "audit.jsonl"
    done = sluice("audit", "export", "-o", file, "--json").expect().document
    head, last = done["head"], done["last"]
    assert sluice("audit", "verify", file, "--head", head, "--json").expect().document == {
        "first": 1,
        "last": last,
        "head": head,
        "known": [head],
    }
    lines = file.read_bytes().splitlines(keepends=True)

    def damaged(parts: list[bytes], *options: str) -> str:
        broken = tmp_path / "broken.jsonl"
        broken.write_bytes(b"".join(parts))
        return sluice("audit", "verify", broken, *options).expect(7).err

    assert "AUDIT_BROKEN: record 3 is missing" in damaged(lines[:2] + lines[3:])
    assert "was changed" in damaged([lines[0], lines[1].replace(b"SetRole", b"GetRole"), *lines[2:]])
    assert "record 2 is missing" in damaged([lines[0], lines[2], lines[1], *lines[3:]])
    assert "its end is gone" in damaged(lines[:-1], "--head", head)
    sluice("audit", "verify", file, "--head", "nonsense").expect(3)
    # Older segments that were moved away: the rest goes on from a head that was kept.
    (tmp_path / "rest.jsonl").write_bytes(b"".join(lines[2:]))
    middle = tmp_path / "middle.jsonl"
    middle.write_bytes(b"".join(lines[:2]))
    second = sluice("audit", "verify", middle, "--json").expect().document["head"]
    sluice("audit", "verify", tmp_path / "rest.jsonl", "--after", second, "--head", head).expect()
    other = second[:-1] + ("1" if second[-1] == "0" else "0")
    assert "does not follow" in damaged(lines[2:], "--after", other)


def test_what_was_seen_once_must_still_be_there(control: ControlPlane) -> None:
    sluice("operator", "role", "ann", "viewer").expect()
    first = sluice("audit", "verify").expect().out
    assert "none is missing or changed" in first
    sluice("operator", "role", "ann", "operator").expect()
    assert "known before: " in sluice("audit", "verify").expect().out
    # The control plane loses its newest records, and nobody kept a head but this user.
    kept = heads.seen(control.address)
    assert kept is not None
    control.stop()
    (segment,) = (control.data / "audit").iterdir()
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[:-4]))
    control.start()
    assert "AUDIT_BROKEN" in sluice("audit", "verify").expect(7).err
    assert heads.seen(control.address) == kept
    # What is kept is not silently begun anew either.
    heads.heads_file().write_text("[]")
    assert "CONFIG_INVALID" in sluice("audit", "verify").expect(3).err


def test_an_enrolment_is_listed_with_who_was_let_in_and_its_own_outcome() -> None:
    record = {
        "address": "10.0.0.7",
        "event": "call",
        "method": "Enrolment.Enrol",
        "object": "spiffe://fleet.test/device/pi-7",
        "outcome": "OK",
        "sequence": 1,
        "time": "2026-11-24T21:03:11.000000Z",
    }
    assert list(_rows([record])) == [("11-24 21:03:11", "10.0.0.7", "Enrol", "device/pi-7", "OK")]
