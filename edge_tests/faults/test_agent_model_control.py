"""A whole agent whose clients unload and load models: what they end stays ended, and nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from edge_tests.harness.agent import AgentProcess
from edge_tests.harness.models import samples
from edge_tests.harness.world import MODEL, World
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

ROW = samples(1)["x"]


class Client:
    """What a client sees of one agent."""

    def __init__(self, agent: AgentProcess) -> None:
        self.stub = pb_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(agent.address))

    def infer(self) -> str:
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=ROW.shape)
        request = pb.ModelInferRequest(model_name=MODEL, inputs=[tensor], raw_input_contents=[ROW.tobytes()])
        answer = self.stub.ModelInfer(request, timeout=20)
        assert np.isfinite(np.frombuffer(answer.raw_output_contents[0], np.float32)).all()
        return str(answer.model_version)

    def states(self) -> dict[str, str]:
        found = self.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=20).models
        return {f"{item.name}@{item.version}": item.state for item in found}

    def load(self) -> None:
        self.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=MODEL), timeout=60)

    def unload(self) -> None:
        self.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=MODEL), timeout=60)


@pytest.mark.e2e
def test_unloaded_models_stay_away_until_somebody_wants_them(tmp_path: Path) -> None:
    settings = {"inference.model_control": True, "metrics.address": "127.0.0.1:0"}
    with (
        World(tmp_path) as world,
        AgentProcess(tmp_path / "a", world.address, "box", settings=settings) as agent,
    ):
        world.wait_for_devices("box")
        for version, change in ((1, 0.0), (2, 0.001)):
            world.publish_tiny(change=change)
            world.wait_for_end(world.roll_out(version))
            agent.wait_for_version(MODEL, version)
        client = Client(agent)
        config = client.stub.ModelConfig(pb.ModelConfigRequest(name=MODEL), timeout=20).config
        assert config.max_batch_size == 64  # seen to answer right in batches when it was activated
        client.unload()
        assert agent.workers() == []
        assert client.states() == {f"{MODEL}@1": "UNAVAILABLE", f"{MODEL}@2": "UNAVAILABLE"}
        with pytest.raises(grpc.RpcError) as caught:
            client.infer()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        time.sleep(3)  # the control plane is polled each second: that must not bring it back
        assert agent.workers() == []
        client.load()
        client.load()
        assert client.infer() == "2"
        assert client.states() == {f"{MODEL}@1": "UNAVAILABLE", f"{MODEL}@2": "READY"}
        client.unload()
        world.publish_tiny(change=0.002)
        world.wait_for_end(world.roll_out(3))
        assert client.infer() == "3"  # a rollout serves it
        client.unload()
        agent.restart()
        agent.wait_for_version(MODEL, 3)
        assert Client(agent).infer() == "3"  # and so does the next start


@pytest.mark.e2e
def test_clients_may_not_unless_the_box_allows_it(tmp_path: Path) -> None:
    with World(tmp_path) as world, AgentProcess(tmp_path / "a", world.address, "box") as agent:
        world.wait_for_devices("box")
        world.publish_tiny()
        world.wait_for_end(world.roll_out(1))
        agent.wait_for_version(MODEL, 1)
        client = Client(agent)
        for call in (client.load, client.unload):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "may not load or unload" in caught.value.details()
        assert client.infer() == "1"
