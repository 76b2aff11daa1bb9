"""A control plane and an operator for end-to-end tests: publish tiny models, roll them out, watch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.models import golden, samples, tiny_onnx, tiny_tflite
from edge_tests.harness.signing import OperatorTrust
from fleet.client import ControlClient
from fleet.publish import Published, prepare, publish
from fleet.recipe import Recipe, VariantRecipe
from sluice.api.v1 import devices_pb2, rollouts_pb2

MODEL = "tiny"
REGISTER_S = 20.0
ROLLOUT_S = 60.0
HIDDEN = 512  # of the tiny network; its file is then some 300 KB


class World:
    """One control plane and what an operator does with it; versions are signed, and agents have its root.

    Args:
        directory: for the control plane's data and the models.
        options: further arguments of the control plane.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.control = ControlPlane(
            directory / "control", "--heartbeat-interval-ms", "500", "--poll-interval-ms", "1000", *options
        )
        self.control.start()
        self.client = ControlClient(self.control.address)
        self.trust = OperatorTrust(directory / "trust", self.client)
        self.models: dict[int, Path] = {}

    @property
    def address(self) -> str:
        return self.control.address

    def publish_tiny(
        self, *, change: float = 0.0, hidden: int = HIDDEN, tflite: bool = False, with_golden: bool = True
    ) -> Published:
        """The next version of MODEL, fine-tuned by `change`; as ONNX, and as TensorFlow Lite if asked."""
        place = self.directory / f"model-{len(self.models) + 1}"
        place.mkdir()
        onnx = tiny_onnx(place / "tiny.onnx", change=change, hidden=hidden)
        answers = golden(place / "golden.npz", onnx, samples(8)) if with_golden else None
        variants = [VariantRecipe(onnx, golden=answers)]
        if tflite:
            variants.append(
                VariantRecipe(
                    tiny_tflite(place / "tiny.tflite", change=change, hidden=hidden), golden=answers
                )
            )
        return self.publish(*variants)

    def publish(self, *variants: VariantRecipe, model: str = MODEL) -> Published:
        """The next version of a model."""
        published = publish(
            self.client, prepare(Recipe(model=model, variants=variants)), sign=self.trust.signing.sign_version
        )
        self.models[published.manifest.version] = variants[0].file
        return published

    def wait_for_devices(self, *device_ids: str) -> None:
        """Waits until the control plane has heard of these devices."""
        until = time.monotonic() + REGISTER_S
        while True:
            known = {device.id for device in self.client.list_devices()}
            if known >= set(device_ids):
                return
            assert time.monotonic() < until, f"only {known} registered\n{self.control.log[-4000:]}"
            time.sleep(0.05)

    def roll_out(
        self, version: int = 0, devices: Sequence[str] = (), deadline_s: int = 600, model: str = MODEL
    ) -> str:
        """Starts a rollout of a model to the devices, or to all; returns its id."""
        selector = devices_pb2.Selector(device_ids=devices)
        phase = rollouts_pb2.Phase(selector=selector, deadline_s=deadline_s, max_failed_percent=0)
        return self.client.create_rollout(model, version, [phase]).id

    def wait_for_end(self, rollout_id: str, timeout_s: float = ROLLOUT_S) -> rollouts_pb2.Rollout:
        """Waits until a rollout ended."""
        until = time.monotonic() + timeout_s
        while True:
            rollout = self.client.get_rollout(rollout_id)
            if rollout.state not in (
                rollouts_pb2.ROLLOUT_STATE_RUNNING,
                rollouts_pb2.ROLLOUT_STATE_UNSPECIFIED,
            ):
                return rollout
            assert time.monotonic() < until, (
                f"the rollout does not end: {rollout}\n{self.control.log[-4000:]}"
            )
            time.sleep(0.05)

    def close(self) -> None:
        self.trust.close()
        self.client.close()
        self.control.stop(check=False)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
