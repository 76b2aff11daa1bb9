"""`explain` names each fault of a repository, and says nothing wrong of a sound one."""

from __future__ import annotations

import json
from datetime import timedelta

from securesystemslib.signer import CryptoSigner

from edge_tests.unit.updater.trust_repository import MODEL, Simulator
from updater.trust import roles
from updater.trust.chain import Finding, explain
from updater.trust.documents import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, sign, write


def repository() -> Simulator:
    made = Simulator()
    made.push(1)
    team = CryptoSigner.generate_ed25519()
    after = roles.delegate(
        made.targets(), "team", roles.RoleKeys((team.public_key,)), ["team-*"], made.until(365)
    )
    sign(after, made.signers)
    theirs = roles.make_targets(made.until(365))
    sign(theirs, [team])
    made.publish((TARGETS, write(after)), ("team", write(theirs)))
    return made


def findings(made: Simulator, days: float = 0, **others: bytes | None) -> list[Finding]:
    given = {**made.others(), **others}
    present = {role: data for role, data in given.items() if data is not None}
    roots = [made.history[ROOT, version] for version in range(1, made.root().signed.version + 1)]
    return explain(roots, present, made.now + timedelta(days=days))


def faults(found: list[Finding]) -> dict[str, str]:
    return {item.role: item.text for item in found if not item.sound}


def test_a_sound_one() -> None:
    found = findings(repository())
    assert faults(found) == {}
    text = "\n".join(item.text for item in found)
    assert f"names {MODEL}/1: manifest sha256:" in text
    assert "leaves team-* to team" in text
    assert "good until" in text


def test_each_fault_is_named() -> None:
    made = repository()
    value = json.loads(made.repository.targets[TARGETS])
    value["signed"]["targets"].clear()
    assert "NOT signed" in faults(findings(made, targets=json.dumps(value).encode()))[TARGETS]
    assert faults(findings(made, snapshot=None)).keys() == {SNAPSHOT, TARGETS, "team"}
    assert "METADATA" not in faults(findings(made, timestamp=b"{"))[TIMESTAMP]
    old = made.others()[SNAPSHOT]
    made.push(2)
    assert "is NOT the one that is listed" in faults(findings(made, snapshot=old))[SNAPSHOT]
    assert faults(findings(made, team=None)) == {"team": "is missing"}


def test_dates() -> None:
    made = repository()
    assert "EXPIRED" in faults(findings(made, days=8))[TIMESTAMP]
    assert faults(findings(made, days=400)).keys() >= {ROOT, TIMESTAMP, SNAPSHOT, TARGETS, "team"}
    assert any("days from now" in item.text for item in findings(made))


def test_a_root_that_does_not_follow() -> None:
    made = repository()
    thief = CryptoSigner.generate_ed25519()
    forged = roles.change_root(made.root(), ROOT, made.until(365), add=[thief.public_key])
    sign(forged, [thief])
    found = explain([made.pinned, write(forged)], made.others(), made.now)
    assert "NOT signed by 0 of the 1 keys that the root before needs" in faults(found)[ROOT]
    assert faults(explain([], {}, made.now)).keys() == {ROOT}
