"""The device's verified copy against hostile repositories, wrong clocks, damage and power cuts."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.ngclient import Updater

from edge_tests.unit.updater.trust_repository import MODEL, Simulator, digest_of
from sluice.api.v1 import errors_pb2
from updater import limits
from updater.errors import SluiceError
from updater.trust import client as client_module
from updater.trust import roles
from updater.trust.client import DurableUpdater, TrustClient
from updater.trust.documents import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, read, sign, write

EXHAUSTIVE = os.environ.get("SLUICE_EXHAUSTIVE") == "1"


@pytest.fixture
def simulator() -> Simulator:
    made = Simulator()
    made.push(1)
    return made


@pytest.fixture
def device(simulator: Simulator, tmp_path: Path) -> TrustClient:
    made = simulator.device(tmp_path / "trust")
    made.refresh()
    return made


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(SluiceError) as caught:
        work()
    return caught.value.code


def named(device: TrustClient, version: int) -> str:
    found = device.version(MODEL, version)
    return found.digest if found is not None else ""


def newest(simulator: Simulator, role: str) -> tuple[str, int | None]:
    """What a device asks for to get a role's newest metadata."""
    return (role, None if role == TIMESTAMP else simulator.newest()[role])


def test_a_device_sees_what_is_signed_and_nothing_else(simulator: Simulator, device: TrustClient) -> None:
    assert named(device, 1) == digest_of(1)
    assert named(device, 2) == ""
    simulator.push(2)
    device.refresh()
    assert named(device, 2) == digest_of(2)


def test_rollback_of_the_timestamp(simulator: Simulator, device: TrustClient) -> None:
    old = simulator.history[TIMESTAMP, simulator.newest()[TIMESTAMP]]
    simulator.push(2)
    device.refresh()
    simulator.served[TIMESTAMP, None] = old
    assert refused(device.refresh) == "METADATA_ROLLED_BACK"
    assert device.stored_target("detector/2") is not None


def test_rollback_of_snapshot_or_targets_by_a_thief_of_the_online_key(
    simulator: Simulator, device: TrustClient
) -> None:
    before = simulator.repository
    simulator.push(2)
    device.refresh()
    simulator.repository = simulator.repository.__class__(
        before.root, before.targets, simulator.repository.online
    )
    simulator.resign()  # a new, well-signed snapshot that lists the old targets
    assert refused(device.refresh) == "METADATA_ROLLED_BACK"


def test_rollback_after_a_restart(simulator: Simulator, device: TrustClient, tmp_path: Path) -> None:
    old = simulator.state()
    simulator.push(2)
    device.refresh()
    simulator.repository, simulator.history = old
    again = simulator.device(tmp_path / "trust")
    assert refused(again.refresh) == "METADATA_ROLLED_BACK"


def test_freeze_ends_when_the_timestamp_does(simulator: Simulator, device: TrustClient) -> None:
    frozen = simulator.history[TIMESTAMP, simulator.newest()[TIMESTAMP]]
    simulator.served[TIMESTAMP, None] = frozen
    simulator.pass_days(6)
    device.refresh()  # still within its life
    simulator.pass_days(2)
    assert refused(device.refresh) == "METADATA_EXPIRED"
    del simulator.served[TIMESTAMP, None]
    device.refresh()


def test_mix_and_match(simulator: Simulator, device: TrustClient) -> None:
    """Parts of two states, each well signed, do not go together."""
    old = dict(simulator.newest())
    old_data = {role: simulator.history[role, old[role]] for role in (SNAPSHOT, TARGETS)}
    simulator.push(2)
    for role, data in old_data.items():
        simulator.served = {newest(simulator, role): data}
        assert refused(device.refresh) == "METADATA_INVALID", role
    simulator.served = {}
    device.refresh()


@pytest.mark.parametrize("role", [TIMESTAMP, SNAPSHOT, TARGETS, ROOT])
def test_endless_data(simulator: Simulator, device: TrustClient, role: str) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        for _ in itertools.count():
            taken += 1 << 16
            yield b"x" * (1 << 16)

    simulator.push(2)
    place = (ROOT, 2) if role == ROOT else newest(simulator, role)
    simulator.served[place] = endless()
    assert refused(device.refresh) == "LIMIT_EXCEEDED"
    assert taken <= limits.MAX_TARGETS_BYTES + (1 << 16)


def test_too_few_signatures(tmp_path: Path) -> None:
    simulator = Simulator(targets_keys=3, targets_threshold=2)
    simulator.push(1)
    device = simulator.device(tmp_path / "trust")
    device.refresh()
    after = roles.add_version(simulator.targets(), MODEL, 2, digest_of(2), 100, simulator.until(9))
    sign(after, simulator.signers[:1])
    alone = write(after)
    assert refused(lambda: simulator.publish((TARGETS, alone))) == "SIGNATURE_INVALID"
    # The same signature twice, under its own name and another key's, is still one.
    value = json.loads(alone)
    value["signatures"].append({**value["signatures"][0], "keyid": simulator.signers[1].public_key.keyid})
    twice = json.dumps(value).encode()
    assert refused(lambda: simulator.publish((TARGETS, twice))) == "SIGNATURE_INVALID"
    _force(simulator, TARGETS, twice, after.signed.version)
    assert refused(device.refresh) == "SIGNATURE_INVALID"


def test_a_thief_of_the_online_key_names_no_version(simulator: Simulator, device: TrustClient) -> None:
    after = roles.add_version(simulator.targets(), MODEL, 2, digest_of(2), 100, simulator.until(9))
    sign(after, [simulator.online])
    _force(simulator, TARGETS, write(after), after.signed.version)
    assert refused(device.refresh) == "SIGNATURE_INVALID"


def test_unsigned_custom_fields(simulator: Simulator, device: TrustClient) -> None:
    """`allow` lives in a target's custom part, which is signed like the rest."""
    value = json.loads(simulator.repository.targets[TARGETS])
    value["signed"]["targets"]["detector/1"]["custom"] = {roles.ALLOWED_FROM: 9}
    value["signed"]["version"] += 1
    _force(simulator, TARGETS, json.dumps(value).encode(), value["signed"]["version"])
    assert refused(device.refresh) == "SIGNATURE_INVALID"
    stored = device.stored_target("detector/1")
    assert stored is not None
    assert roles.allowed_from(stored) == 0


def _force(simulator: Simulator, role: str, data: bytes, version: int) -> None:
    """Serves targets that the repository's own check would refuse, listed by a well-signed snapshot."""
    simulator.history[role, version] = data
    simulator.repository = simulator.repository.__class__(
        simulator.repository.root,
        {**simulator.repository.targets, role: data},
        simulator.repository.online,
    )
    simulator.resign()


def test_a_root_that_the_old_one_did_not_sign(simulator: Simulator, device: TrustClient) -> None:
    thief = CryptoSigner.generate_ed25519()
    forged = roles.change_root(
        simulator.root(), ROOT, simulator.until(365), add=[thief.public_key], remove=[]
    )
    sign(forged, [thief])
    simulator.served[ROOT, 2] = write(forged)
    assert refused(device.refresh) == "SIGNATURE_INVALID"
    assert device.root.version == 1


@pytest.mark.parametrize("years", [-50, -5, 5, 50])
def test_clocks_ahead_and_behind_by_years(
    simulator: Simulator, device: TrustClient, tmp_path: Path, years: int
) -> None:
    """Ahead, nothing new is taken until the clock is right; behind, what is new still is. Neither wedges."""
    simulator.push(2)
    wrong = simulator.now + timedelta(days=365 * years)
    lost = simulator.device(tmp_path / "trust", clock=lambda: wrong)
    if years > 0:
        assert refused(lost.refresh) == "METADATA_EXPIRED"
        assert lost.stored_target("detector/1") is not None
    else:
        lost.refresh()
        assert named(lost, 2) == digest_of(2)
    right = simulator.device(tmp_path / "trust")
    right.refresh()
    assert named(right, 2) == digest_of(2)


def test_a_box_that_was_off_for_years(simulator: Simulator, device: TrustClient, tmp_path: Path) -> None:
    """Everything that it stored has expired, two roots were rotated meanwhile: it knows and it catches up."""
    del device
    for _ in range(2):
        simulator.now += timedelta(days=300)
        new = CryptoSigner.generate_ed25519()
        after = roles.change_root(
            simulator.root(),
            ROOT,
            simulator.until(365),
            add=[new.public_key],
            remove=[simulator.roots[0].public_key.keyid],
        )
        sign(after, [*simulator.roots, new])
        simulator.roots = [new]
        renewed = roles.renew(simulator.targets(), simulator.until(365))
        sign(renewed, simulator.signers)
        simulator.publish((ROOT, write(after)), (TARGETS, write(renewed)))
    simulator.push(2)
    box = simulator.device(tmp_path / "trust")
    stored = box.stored_target("detector/1")  # before any network
    assert stored is not None
    assert roles.named(stored).digest == digest_of(1)
    box.refresh()
    assert box.root.version == 3
    assert named(box, 2) == digest_of(2)


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 4096, b'{"signed": {}, "signatures": []}'])
@pytest.mark.parametrize("role", [TIMESTAMP, SNAPSHOT, TARGETS, "root_history/1.root", "root_history/2.root"])
def test_damaged_stored_files_never_wedge(
    simulator: Simulator, device: TrustClient, tmp_path: Path, role: str, damage: bytes
) -> None:
    new = CryptoSigner.generate_ed25519()
    after = roles.change_root(simulator.root(), ROOT, simulator.until(365), add=[new.public_key])
    sign(after, simulator.roots)
    simulator.publish((ROOT, write(after)))
    device.refresh()
    (tmp_path / "trust" / f"{role}.json").write_bytes(damage)
    simulator.push(2)
    again = simulator.device(tmp_path / "trust")
    again.refresh()
    assert again.root.version == 2
    assert named(again, 2) == digest_of(2)


def test_nothing_is_stored_of_what_was_refused(
    simulator: Simulator, device: TrustClient, tmp_path: Path
) -> None:
    kept = _files(tmp_path / "trust")
    simulator.push(2)
    for place in (newest(simulator, TIMESTAMP), newest(simulator, SNAPSHOT), newest(simulator, TARGETS)):
        simulator.served = {place: b"{}"}
        refused(device.refresh)
    simulator.served = {}
    now = _files(tmp_path / "trust")
    assert now[TARGETS] == kept[TARGETS]
    assert device.stored_target("detector/1") is not None


def _files(directory: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in directory.glob("*.json")}


def test_what_is_overridden_is_what_ngclient_calls() -> None:
    """Private names of a dependency: a release that renames them must not make us lose fsync in silence."""
    for name in ("_persist_file", "_update_root_symlink", "_load_root", "_download_metadata"):
        assert callable(getattr(Updater, name))
        assert getattr(DurableUpdater, name) is not getattr(Updater, name)


def test_every_stored_file_is_written_whole_and_synced(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = client_module.write_atomic

    def note(path: Path, data: bytes) -> None:
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(client_module, "write_atomic", note)
    simulator.device(tmp_path / "trust").refresh()
    stored = {path.name for path in (tmp_path / "trust").rglob("*.json") if not path.is_symlink()}
    assert set(written) == stored == {"1.root.json", "timestamp.json", "snapshot.json", "targets.json"}


def test_no_network_is_told_as_that(simulator: Simulator, device: TrustClient) -> None:
    def away(_role: str, _version: int | None) -> None:
        raise SluiceError(errors_pb2.CONTROL_UNREACHABLE, "no answer")

    simulator.fetch = away  # type: ignore[method-assign,assignment]
    lost = simulator.device(device._directory)
    assert refused(lost.refresh) == "CONTROL_UNREACHABLE"
    assert lost.stored_target("detector/1") is not None


def test_a_stored_copy_is_proven_before_it_is_believed(
    simulator: Simulator, device: TrustClient, tmp_path: Path
) -> None:
    path = tmp_path / "trust" / "targets.json"
    value = json.loads(path.read_bytes())
    value["signed"]["targets"]["detector/1"]["hashes"]["sha256"] = "0" * 64
    path.write_text(json.dumps(value))
    assert refused(lambda: device.stored_target("detector/1")) == "METADATA_INVALID"


@pytest.mark.parametrize("role", [ROOT, TIMESTAMP, SNAPSHOT, TARGETS])
def test_flipping_any_bit_changes_nothing_that_is_believed(role: str, tmp_path: Path) -> None:
    """A flipped bit is refused, or leaves the parsed `signed` part what it was.

    The latter is the case of hex digits in signatures and key ids, and a space for a leading zero in a date.

    One bit of each byte, the next bit in the next; all of them with SLUICE_EXHAUSTIVE=1 (`make soak`).
    """
    simulator = Simulator()
    simulator.push(1)
    after = roles.renew(simulator.root(), simulator.until(365))
    sign(after, simulator.roots)
    simulator.publish((ROOT, write(after)))
    place = (ROOT, 2) if role == ROOT else newest(simulator, role)
    data = simulator.history[role, simulator.newest()[role]]
    signed = read(role, data).signed
    accepted = 0
    flips = [(at, bit) for at in range(len(data)) for bit in (range(8) if EXHAUSTIVE else (at % 8,))]
    for at, bit in flips:
        mutated = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        simulator.served = {place: mutated}
        place_of_copy = tmp_path / "copy"
        updater = _InMemory(str(place_of_copy), simulator)
        try:
            updater.refresh()
        except Exception:  # noqa: BLE001 - whatever refuses it
            continue
        accepted += 1
        assert read(role, mutated).signed == signed, (role, at, bit)
    simulator.served = {}
    _InMemory(str(tmp_path / "copy"), simulator).refresh()  # the unharmed one is accepted
    assert accepted < len(flips) / 10
    if EXHAUSTIVE:
        print(f"{role}: {len(data)} bytes, {len(flips)} flips, {accepted} accepted with the same signed part")


class _InMemory(DurableUpdater):
    """The device's updater without its files: a refresh from nothing, thousands of times."""

    def __init__(self, directory: str, simulator: Simulator) -> None:
        Path(directory).mkdir(exist_ok=True)
        super().__init__(
            directory,
            client_module._BASE,
            fetcher=client_module.FunctionFetcher(simulator.fetch),
            config=client_module._CONFIG,
            bootstrap=simulator.pinned,
        )
        self.clock = lambda _root: simulator.now

    def _persist_file(self, filename: str, data: bytes) -> None:
        del filename, data

    def _persist_root(self, version: int, data: bytes) -> None:
        del version, data

    def _update_root_symlink(self) -> None:
        pass
