"""What goes down a stream once trust is set up: each desired state proven, and sent again in time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_tests.harness.local_control import LocalControl
from edge_tests.harness.operator import Device
from edge_tests.harness.signing import OperatorTrust
from fleet.client import ControlClient
from sluice.api.v1 import sync_pb2
from updater.trust.director import read_desired
from updater.trust.documents import read_root


def test_a_stream_carries_proofs_from_the_moment_trust_is_set_up(tmp_path: Path) -> None:
    with (
        LocalControl(tmp_path / "control") as control,
        ControlClient(control.address) as client,
        Device(control.address, "box") as device,
    ):
        assert not device.desired.HasField("proof")
        trust = OperatorTrust(tmp_path / "trust", client)
        root = read_root(trust.root.read_bytes()).signed
        again = device.next_desired()  # because a root was published
        statement = read_desired(again.proof, root, "box", datetime.now(UTC))
        bare = sync_pb2.DesiredState()
        bare.CopyFrom(again)
        bare.ClearField("proof")
        assert statement.desired == bare
        trust.close()


def test_a_desired_state_is_sent_again_signed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A box that refused it, because its clock was wrong for example, gets another chance."""
    monkeypatch.setattr("fleet.services.sync.DESIRED_RESEND_S", 0.2)
    with (
        LocalControl(tmp_path / "control") as control,
        ControlClient(control.address) as client,
    ):
        trust = OperatorTrust(tmp_path / "trust", client)
        root = read_root(trust.root.read_bytes()).signed
        with Device(control.address, "box") as device:
            states = [device.desired, device.next_desired(), device.next_desired()]
        issued = [
            read_desired(state.proof, root, "box", datetime.now(UTC)).issue_time.ToNanoseconds()
            for state in states
        ]
        assert issued == sorted(set(issued))
        assert len({state.generation for state in states}) == 1
        trust.close()
