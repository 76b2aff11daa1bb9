"""A version policy on a whole box: versions kept, addressed, and loaded again after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples, tiny_onnx
from edge_tests.harness.serving import TritonCommands, eventually
from edge_tests.harness.world import MODEL, World
from fleet.recipe import VariantRecipe

pytestmark = pytest.mark.e2e


def loaded(agent: AgentProcess) -> dict[int, str]:
    return {worker.version: worker.role for worker in agent.status().workers}


def test_the_newest_versions_can_be_asked_for(tmp_path: Path) -> None:
    """The disk alone would keep no version but those of the slots."""
    settings = {"update.soak_s": 0.1, "update.keep_versions": 0}
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box", settings=settings) as agent,
    ):
        world.wait_for_devices("box")
        for number in range(1, 5):
            model = tiny_onnx(tmp_path / f"{number}.onnx", seed=number)
            world.publish(VariantRecipe(model, options={"versions": "latest:3"}))
            world.wait_for_end(world.roll_out(number))
        expected = {4: "active", 3: "held", 2: "held"}
        eventually(lambda: loaded(agent) == expected, f"the newest three are loaded, not {loaded(agent)}")
        agent.restart()
        eventually(lambda: loaded(agent) == expected, "so they are after a restart")
        row = {"x": {"datatype": "FP32", "data": samples(1)["x"].tolist()}}
        answers = {}
        with TritonCommands(agent.address, extensions=True) as client:
            for version in ("2", "3", "4", "1"):
                options = {"model_version": version}
                answers[version] = client.ask(call="infer", model=MODEL, inputs=row, options=options)
            config = client.ask(call="config", model=MODEL)
            index = client.ask(call="index")["models"]
        assert [answers[version]["version"] for version in ("2", "3", "4")] == ["2", "3", "4"]
        assert len({str(answers[version]["outputs"]) for version in ("2", "3", "4")}) == 3
        assert answers["1"]["status"] == "StatusCode.NOT_FOUND"
        assert config["version_policy"] == {"latest": {"num_versions": 3}}
        assert {item["version"]: item["state"] for item in index} == dict.fromkeys("234", "READY")
        world.publish(VariantRecipe(tiny_onnx(tmp_path / "5.onnx", seed=5)))
        world.wait_for_end(world.roll_out(5))
        eventually(lambda: loaded(agent) == {5: "active"}, "without the policy the others end")
