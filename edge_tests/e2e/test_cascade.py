"""A cascade rolled out to a box: in the wrong order, then whole; and one that hands on to itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples, tiny_onnx
from edge_tests.harness.serving import TritonCommands
from edge_tests.harness.world import World
from fleet.recipe import VariantRecipe
from sluice.api.v1 import errors_pb2

pytestmark = pytest.mark.e2e


def test_a_cascade_is_served_once_both_models_are_there(tmp_path: Path) -> None:
    small, large = (
        tiny_onnx(tmp_path / f"{name}.onnx", seed) for seed, name in enumerate(("small", "large"))
    )
    settings = {"update.soak_s": 0.2}
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box", settings=settings) as agent,
    ):
        world.wait_for_devices("box")
        options = {"cascade_to": "large", "cascade_threshold": "1"}  # unsure of everything
        world.publish(VariantRecipe(small, options=options), model="small")
        world.publish(VariantRecipe(large), model="large")
        world.roll_out(model="small")
        failure = agent.wait_for_model("small", lambda item: item.HasField("failure")).failure
        assert failure.reason == errors_pb2.CASCADE_INCOMPLETE
        assert "small@1 hands on to large, which this box does not serve" in failure.message
        assert not failure.final
        world.wait_for_end(world.roll_out(model="large"))
        agent.wait_for_version("small", 1)
        data = samples(3)["x"].tolist()
        with TritonCommands(agent.address) as client:
            both = [
                client.ask(call="infer", model=model, inputs={"x": {"datatype": "FP32", "data": data}})
                for model in ("small", "large")
            ]
        np.testing.assert_allclose(both[0]["outputs"]["y"], both[1]["outputs"]["y"], rtol=1e-5, atol=1e-6)

        world.publish(VariantRecipe(large, options={"cascade_to": "small"}), model="large")
        world.roll_out(2, model="large")
        failure = agent.wait_for_failure("large")
        assert failure.reason == errors_pb2.CASCADE_INVALID
        assert "a circle: large → small → large" in failure.message
        assert agent.model("large").active_version == 1
        agent.restart()
        assert agent.wait_for_version("small", 1).healthy, "the models are started in any order"
