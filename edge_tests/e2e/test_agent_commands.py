"""`sluice-agent` as a person or a script meets it, and telemetry that arrives."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from agent import cli
from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.world import MODEL, World
from sluice.api.v1 import telemetry_pb2, telemetry_pb2_grpc


def test_errors_have_stable_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--socket", str(tmp_path / "none.sock")]) == 8
    assert "AGENT_UNREACHABLE" in capsys.readouterr().err
    assert cli.main(["revert", "--json", "--socket", str(tmp_path / "none.sock"), "m"]) == 8
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "AGENT_UNREACHABLE"
    config = tmp_path / "agent.toml"
    config.write_text("[control]\nadress = 1\n")
    for verb in ("run", "status", "doctor"):
        assert cli.main([verb, "--config", str(config)]) == 3
        assert "control.adress is not a key" in capsys.readouterr().err
    assert cli.main(["dance"]) == 2
    assert "sluice-agent: USAGE: " in capsys.readouterr().err


@pytest.mark.e2e
def test_revert_names_the_models_of_the_box(tmp_path: Path) -> None:
    with World(tmp_path) as world, AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        nothing = json.loads(agent.command("revert", "detector", "--json").stdout)["error"]
        assert nothing["reason"] == "MODEL_UNKNOWN"
        assert nothing["hint"] == "no version was rolled out to it yet"
        for version, change in ((1, 0.0), (2, 0.001)):
            world.publish_tiny(change=change)
            world.wait_for_end(world.roll_out(version))
            agent.wait_for_version(MODEL, version)
        refused = agent.command("revert", "detector")
        assert refused.returncode == 4
        assert refused.stderr == (
            f"sluice-agent: MODEL_UNKNOWN: this box has no model 'detector'\n  help: it has {MODEL}\n"
        )
        done = agent.command("revert", MODEL, "--json")
        assert json.loads(done.stdout) == {"model": MODEL, "from_version": 2, "to_version": 1}
        assert agent.command("revert", MODEL).returncode == 5
        (reported,) = json.loads(agent.command("status", "--json").stdout)["reported"]
        assert (reported["active_version"], reported["pinned_version"], reported["step"]) == (
            1,
            1,
            "reverted",
        )
        assert "went back from tiny@2 to version 1: an administrator asked" in agent.tail()


@pytest.mark.e2e
def test_status_and_doctor_on_a_live_box_and_telemetry_arrives(tmp_path: Path) -> None:
    with World(tmp_path) as world, AgentProcess(tmp_path / "a", world.address, "box") as agent:
        agent.wait_for(lambda status: status.control_connected)
        status = json.loads(agent.command("status", "--json").stdout)
        assert status["device_id"] == "box"
        assert status["control_connected"] is True
        doctor = agent.command("doctor")
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
        assert "control plane: " in doctor.stdout
        assert doctor.stdout.endswith("no faults\n")

        with world.control.channel() as channel:
            stub = telemetry_pb2_grpc.TelemetryStub(channel)
            query = telemetry_pb2.QueryMetricsRequest(device_id="box", name="system.memory.utilization")
            until = time.monotonic() + 15
            while len(stub.QueryMetrics(query, timeout=5).metrics) < 2:
                assert time.monotonic() < until, agent.tail()
                time.sleep(0.1)
        agent.wait_for(lambda status: status.outbox_batches == 0)

        world.control.stop()
        findings = json.loads(agent.command("doctor", "--json").stdout)["findings"]
        faults = [item for item in findings if item["state"] == "fault"]
        assert [fault["check"] for fault in faults] == ["enrolment", "trust"]
        untried = [item["check"] for item in findings if item["detail"] == "not tried: see trust"]
        assert untried == ["control plane", "signatures"]
        assert {fault["reason"] for fault in faults} == {"CONTROL_UNREACHABLE"}
        assert all(fault["hint"] for fault in faults)
