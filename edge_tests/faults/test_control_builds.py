"""Encoders that lie, tear, crash or dawdle: the device gets a full copy, never a wrong delta."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, eventually, failing, onnx_model
from sluice.api.v1 import diff_pb2
from updater.delta import apply
from updater.digests import digest_bytes

OLD, NEW = onnx_model(1), onnx_model(1, drift=1e-3)


@pytest.fixture
def control(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ControlPlane]:
    encoder = f"edge_tests.harness.encoders:{request.param}"
    env = {"SLUICE_TEST_GATE": str(tmp_path / "gate")}
    options = ("--disk-reserve-bytes", "0", "--encoder", encoder)
    with ControlPlane(tmp_path / "control", *options, env=env) as running:
        yield running


def push_both(operator: Operator) -> None:
    operator.push("digits", 1, OLD)
    operator.push("digits", 2, NEW)


@pytest.mark.parametrize(
    ("control", "reason"),
    [("wrong_target", "DELTA_PROOF_FAILED"), ("torn", "DELTA_PROOF_FAILED"), ("crash", "INTERNAL")],
    indirect=["control"],
)
def test_a_delta_that_fails_its_proof_is_not_offered(
    control: ControlPlane, reason: str, tmp_path: Path
) -> None:
    with Operator(control.address) as operator:
        push_both(operator)
        plan = operator.plan("digits", 2, [digest_bytes(OLD)])
        assert plan.files[0].WhichOneof("how") == "full"
        full = operator.fetch(plan.files[0].full.digest, tmp_path / "full")
        assert apply(None, full, tmp_path / "out") == digest_bytes(NEW)
        request = diff_pb2.DescribeRequest(base_digest=digest_bytes(OLD), target_digest=digest_bytes(NEW))
        assert reason in failing(lambda: operator.diff.Describe(request)).message
        for _ in range(3):  # within the back-off it is not tried again
            operator.plan("digits", 2, [digest_bytes(OLD)])
    assert f"reason={reason}" in control.log
    assert control.log.count(f"delta_started base={digest_bytes(OLD)}") == 1
    assert list((control.data / "deltas" / "staging").iterdir()) == []


@pytest.mark.parametrize("control", ["slow"], indirect=True)
def test_while_a_delta_is_computed_it_is_pending_or_replaced(control: ControlPlane, tmp_path: Path) -> None:
    with Operator(control.address) as operator:
        push_both(operator)
        eventually(lambda: f"delta_built base=none target={digest_bytes(NEW)}" in control.log, "full copy")
        bases = [digest_bytes(OLD)]
        waiting = operator.plan("digits", 2, bases, wait_ms=0)
        assert waiting.files[0].WhichOneof("how") == "pending"
        assert waiting.retry_after_ms > 0
        at_once = operator.plan("digits", 2, bases, wait_ms=0, accept_full=True)
        assert at_once.files[0].WhichOneof("how") == "full"
        assert at_once.retry_after_ms == 0
        (tmp_path / "gate").touch()
        assert operator.plan("digits", 2, bases).files[0].WhichOneof("how") == "delta"


@pytest.mark.parametrize("control", ["slow"], indirect=True)
def test_a_builder_ends_when_the_control_plane_is_killed(control: ControlPlane, tmp_path: Path) -> None:
    import psutil

    with Operator(control.address) as operator:
        push_both(operator)
        eventually(lambda: f"delta_started base={digest_bytes(OLD)}" in control.log, "a build")
    assert control.process is not None

    def builders() -> list[psutil.Process]:
        assert control.process is not None
        return psutil.Process(control.process.pid).children()

    found = eventually(builders, "a builder process")
    control.kill()
    _, alive = psutil.wait_procs(found, timeout=3)
    assert alive == []
    left = control.data / "deltas" / "staging" / "build-0123456789abcdef"
    left.write_bytes(b"half a delta")
    (tmp_path / "gate").touch()
    control.start()
    assert not left.exists(), "a new control plane clears away what builds left"
    with Operator(control.address) as operator:
        assert operator.plan("digits", 2, [digest_bytes(OLD)]).files[0].WhichOneof("how") == "delta"
