"""The gate, over real calls: what a box believes of its control plane, and what it installs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from sqlalchemy import delete

from agent import update_limits as limits
from agent.config import AgentConfig
from agent.state import DesiredModel, State
from agent.trust import Gate
from edge_tests.harness.local_control import LocalControl
from edge_tests.harness.operator import manifest
from edge_tests.harness.signing import OperatorTrust
from edge_tests.harness.trust import BoxChannels, channel, device
from fleet import tables
from fleet.client import ControlClient
from sluice.api.v1 import sync_pb2, sync_pb2_grpc
from updater.errors import SluiceError
from updater.manifest import Manifest
from updater.trust import roles
from updater.trust.decision import Held
from updater.trust.director import sign_desired
from updater.trust.documents import ROOT, TARGETS, in_days
from updater.trust.keys import parse_public_key

DEVICE = "box"


def version(number: int, floor: int = 1) -> Manifest:
    return replace(manifest("m", number, b"model"), floor=floor)


def desired(of: Manifest, rollout: str = "r1") -> DesiredModel:
    return DesiredModel(of.model, of.version, of.digest, rollout)


def held(of: Manifest) -> Held:
    return Held(active=of.version, active_digest=of.digest, floor=of.floor)


@dataclass
class Setting:
    control: LocalControl
    client: ControlClient
    trust: OperatorTrust
    config: AgentConfig
    state: State
    gates: list[Gate]

    def gate(self) -> Gate:
        """A box's gate, as after a restart of its agent."""
        made = Gate(self.config, self.state, BoxChannels(self.config.device_id))
        self.gates.append(made)
        return made

    def sent(self, name: str = DEVICE) -> sync_pb2.DesiredState:
        """What the control plane sends a device."""
        with channel(self.control.address, device(name)) as link:
            hello = sync_pb2.Hello(device_id=name, desired_generation=4)
            answer = sync_pb2_grpc.SyncStub(link).Poll(sync_pb2.PollRequest(hello=hello), timeout=30)
        return answer.desired


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    state = State(tmp_path / "state.db")
    with LocalControl(tmp_path / "control") as control, ControlClient(control.address) as client:
        trust = OperatorTrust(tmp_path / "trust", client)
        config = AgentConfig(control.address, DEVICE, tmp_path / "box", trust_root=trust.root)
        made = Setting(control, client, trust, config, state, [])
        yield made
        trust.close()
        for gate in made.gates:
            gate.close()
    state.close()


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(SluiceError) as caught:
        work()
    return caught.value.code


def test_what_the_control_plane_sends_is_believed_and_nothing_else(setting: Setting) -> None:
    gate = setting.gate()
    sent = setting.sent()
    assert gate.admit(sent).generation == 5
    outside = sync_pb2.DesiredState()
    outside.CopyFrom(sent)
    outside.models.add(model="m", version=9, manifest_digest="sha256:" + "0" * 64)
    assert not gate.admit(outside).models  # only what is signed is taken
    bare = sync_pb2.DesiredState(generation=9)
    assert refused(lambda: gate.admit(bare)) == "SIGNATURE_INVALID"
    assert refused(lambda: gate.admit(setting.sent("other"))) == "METADATA_INVALID"


def test_a_new_online_key_is_found_by_asking_once(setting: Setting) -> None:
    gate = setting.gate()
    gate.admit(setting.sent())
    setting.control.stop()
    (setting.control.data / "trust" / "online.json").unlink()
    setting.control.start()
    # The root does not name the new key yet, so nothing is proven: the box stays with what it has.
    assert refused(lambda: gate.admit(setting.sent())) == "SIGNATURE_INVALID"
    new = parse_public_key(setting.client.get_trust().online_key)
    old = setting.trust.directory.current_root().roles["timestamp"].keyids
    signing = setting.trust.signing
    signing.refresh()
    signing.apply(
        signing.plan(
            {ROOT: lambda root, until: roles.change_root(root, "online", until, add=[new], remove=old)}
        )
    )
    signing.publish()
    assert gate.admit(setting.sent()).generation == 5
    # Who stole the old key speaks no longer.
    thief = sign_desired(DEVICE, sync_pb2.DesiredState(), CryptoSigner.generate_ed25519(), in_days(0), 60)
    assert refused(lambda: gate.admit(sync_pb2.DesiredState(proof=thief))) == "SIGNATURE_INVALID"


def test_only_signed_versions_and_only_this_content(setting: Setting) -> None:
    gate = setting.gate()
    one = version(1)
    assert refused(lambda: gate.check(desired(one), Held())) == "VERSION_NOT_SIGNED"
    setting.trust.sign(one)
    gate.check(desired(one), Held())
    other = DesiredModel("m", 1, "sha256:" + "0" * 64)
    assert refused(lambda: gate.check(other, Held())) == "VERSION_NOT_SIGNED"


def test_down_to_the_floor_and_no_lower_without_a_signature(setting: Setting) -> None:
    gate = setting.gate()
    for number in (1, 2, 3):
        setting.trust.sign(version(number, floor=min(number, 2)))
    running = held(version(3, floor=2))
    gate.check(desired(version(2, floor=2)), running)
    below = desired(version(1))
    assert refused(lambda: gate.check(below, running)) == "VERSION_BELOW_FLOOR"
    signing = setting.trust.signing
    signing.refresh()
    signing.apply(signing.plan({TARGETS: lambda doc, until: roles.allow(doc, "m", 1, 3, until)}))
    signing.publish()
    gate.check(below, running)


def test_its_own_versions_need_nobody_and_no_network(setting: Setting) -> None:
    gate = setting.gate()
    setting.control.stop()
    one, two = version(1), version(2)
    running = replace(held(two), previous_digest=one.digest)
    gate.check(desired(one), running)
    gate.check(desired(two), running)
    assert refused(lambda: gate.check(desired(version(3)), running)) == "CONTROL_UNREACHABLE"
    setting.control.start()


def test_what_was_accepted_fresh_goes_on_without_a_network(setting: Setting) -> None:
    one = version(1)
    setting.trust.sign(one)
    setting.gate().check(desired(one), Held())
    setting.control.stop()
    again = setting.gate()  # the power was cut meanwhile
    again.check(desired(one), Held())
    # Another rollout of it is another decision, and wants fresh metadata.
    assert refused(lambda: again.check(desired(one, "r2"), Held())) == "CONTROL_UNREACHABLE"
    setting.control.start()
    again.check(desired(one, "r2"), Held())


def test_a_version_that_was_taken_back_is_not_installed(setting: Setting) -> None:
    one = version(1)
    setting.trust.sign(one)
    signing = setting.trust.signing
    signing.refresh()
    signing.apply(signing.plan({TARGETS: lambda doc, until: roles.drop_version(doc, "m", 1, until)}))
    signing.publish()
    assert refused(lambda: setting.gate().check(desired(one), Held())) == "VERSION_NOT_SIGNED"


def test_a_control_plane_that_lost_its_metadata_installs_nothing(setting: Setting) -> None:
    one = version(1)
    setting.trust.sign(one)
    gate = setting.gate()
    gate.check(desired(one), Held())
    setting.control.stop()
    from fleet.database import Database

    database = Database(setting.control.data / "control.db")
    with database.engine.begin() as connection:
        connection.execute(delete(tables.trust_metadata))
    database.close()
    setting.control.start()
    assert refused(lambda: gate.check(desired(version(2)), held(one))) == "METADATA_INVALID"
    assert refused(lambda: gate.admit(setting.sent())) == "SIGNATURE_INVALID"


def test_without_a_pinned_root_nothing_is_installed_and_a_broken_one_is_told(
    setting: Setting, tmp_path: Path
) -> None:
    open_gate = Gate(replace(setting.config, trust_root=None), setting.state, BoxChannels())
    assert refused(lambda: open_gate.check(desired(version(9)), Held())) == "VERSION_NOT_SIGNED"
    open_gate.check(desired(version(9)), held(version(9)))  # its own versions need nobody
    assert open_gate.admit(sync_pb2.DesiredState(generation=3)).generation == 3
    open_gate.close()
    absent = replace(setting.config, trust_root=tmp_path / "none.json")
    broken = Gate(absent, setting.state, BoxChannels())  # the box starts and serves all the same
    assert refused(lambda: broken.admit(setting.sent())) == "CONFIG_INVALID"
    (tmp_path / "none.json").write_text("{}")
    assert refused(lambda: broken.admit(setting.sent())) == "METADATA_INVALID"
    assert refused(lambda: broken.check(desired(version(9)), Held())) == "METADATA_INVALID"
    broken.check(desired(version(9)), held(version(9)))
    (tmp_path / "none.json").write_bytes(setting.trust.root.read_bytes())
    assert broken.admit(setting.sent()).generation == 5
    broken.close()


def test_a_refresh_ends_in_time_however_slowly_it_is_fed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.trust.sign(version(1))
    gate = setting.gate()
    monkeypatch.setattr(limits, "REFRESH_TIMEOUT_S", 0.0)
    assert refused(lambda: gate.check(desired(version(1)), Held())) == "CONTROL_UNREACHABLE"
    monkeypatch.undo()
    gate.check(desired(version(1)), Held())
