"""Plan, Fetch and Describe, over gRPC, with real builder processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, eventually, failing, onnx_model
from sluice.api.v1 import diff_pb2
from updater.delta import apply
from updater.digests import digest_bytes

OLD, NEW = onnx_model(1), onnx_model(1, drift=1e-3)
NO_SUCH = digest_bytes(b"no such file")


def push_both(operator: Operator) -> None:
    operator.push("digits", 1, OLD)
    operator.push("digits", 2, NEW)


def how(plan: diff_pb2.PlanResponse) -> list[str | None]:
    return [file.WhichOneof("how") for file in plan.files]


def test_a_device_without_a_useful_base_gets_a_full_copy(operator: Operator) -> None:
    push_both(operator)
    assert how(operator.plan("digits", 2, [NO_SUCH])) == ["full"]


def test_any_stored_file_may_be_the_base(operator: Operator, tmp_path: Path) -> None:
    operator.push("letters", 1, OLD)
    operator.push("digits", 1, NEW)
    offer = operator.plan("digits", 1, [digest_bytes(OLD)]).files[0].delta
    assert offer.base_digest == digest_bytes(OLD)
    base = tmp_path / "base"
    base.write_bytes(OLD)
    delta = operator.fetch(offer.digest, tmp_path / "delta")
    assert apply(base, delta, tmp_path / "out") == digest_bytes(NEW)


def test_a_device_may_go_back_by_a_delta(operator: Operator) -> None:
    push_both(operator)
    assert operator.plan("digits", 1, [digest_bytes(NEW)]).files[0].delta.base_digest == digest_bytes(NEW)


def test_many_devices_asking_at_once_cost_one_build(control: ControlPlane, operator: Operator) -> None:
    operator.push("digits", 1, OLD)
    operator.push("letters", 1, NEW)  # no delta between models is computed ahead
    with ThreadPoolExecutor(20) as pool:
        plans = list(pool.map(lambda _: operator.plan("letters", 1, [digest_bytes(OLD)]), range(20)))
    assert len({plan.files[0].delta.digest for plan in plans}) == 1
    started = f"delta_started base={digest_bytes(OLD)} target={digest_bytes(NEW)}"
    assert control.log.count(started) == 1


def test_deltas_are_computed_ahead_of_the_first_question(control: ControlPlane, operator: Operator) -> None:
    push_both(operator)
    built = f"delta_built base={digest_bytes(OLD)} target={digest_bytes(NEW)}"
    eventually(lambda: built in control.log, "the delta from the previous version")
    assert how(operator.plan("digits", 2, [digest_bytes(OLD)], wait_ms=0)) == ["delta"]


def test_a_delta_survives_a_restart_and_is_not_built_again(control: ControlPlane) -> None:
    with Operator(control.address) as operator:
        push_both(operator)
        first = operator.plan("digits", 2, [digest_bytes(OLD)])
    control.restart()
    with Operator(control.address) as operator:
        assert operator.plan("digits", 2, [digest_bytes(OLD)]) == first
    assert control.log.count(f"delta_started base={digest_bytes(OLD)} target={digest_bytes(NEW)}") == 1


def test_fetch_goes_on_from_any_offset(operator: Operator, tmp_path: Path) -> None:
    operator.push("digits", 1, OLD)
    offer = operator.plan("digits", 1).files[0].full
    whole = operator.fetch(offer.digest, tmp_path / "whole").read_bytes()
    assert len(whole) == offer.size
    for offset in (1, 1000, offer.size - 1, offer.size):
        assert operator.fetch(offer.digest, tmp_path / "part", offset).read_bytes() == whole[offset:]
    request = diff_pb2.FetchRequest(digest=offer.digest, offset=offer.size + 1)
    assert failing(lambda: list(operator.diff.Fetch(request))).code == "REQUEST_INVALID"


@pytest.mark.parametrize(("digest", "code"), [(NO_SUCH, "FILE_UNKNOWN"), ("../../x", "REQUEST_INVALID")])
def test_fetch_of_what_is_not_offered_is_refused(operator: Operator, digest: str, code: str) -> None:
    request = diff_pb2.FetchRequest(digest=digest)
    assert failing(lambda: list(operator.diff.Fetch(request))).code == code


def test_a_model_file_cannot_be_fetched_past_the_plan(operator: Operator) -> None:
    operator.push("digits", 1, OLD)
    request = diff_pb2.FetchRequest(digest=digest_bytes(OLD))
    assert failing(lambda: list(operator.diff.Fetch(request))).code == "FILE_UNKNOWN"


def test_a_decoder_that_lacks_a_needed_feature_is_told(operator: Operator) -> None:
    push_both(operator)
    assert how(operator.plan("digits", 2, [digest_bytes(OLD)])) == ["delta"]
    error = failing(lambda: operator.plan("digits", 2, [digest_bytes(OLD)], features=[]))
    assert error.code == "DELTA_UNSUPPORTED"
    assert "program" in error.message
    assert error.hint == "update the agent on the device"


def test_unknown_and_malformed_plans_have_their_codes(operator: Operator) -> None:
    operator.push("digits", 1, OLD)
    assert failing(lambda: operator.plan("letters", 1)).code == "MODEL_UNKNOWN"
    assert failing(lambda: operator.plan("digits", 2)).code == "VERSION_UNKNOWN"
    assert failing(lambda: operator.plan("digits", 0)).code == "REQUEST_INVALID"
    error = failing(lambda: operator.plan("digits", 1, variant="jetson"))
    assert error.code == "NO_COMPATIBLE_VARIANT"
    assert "default" in error.message
    assert failing(lambda: operator.plan("digits", 1, ["sha256:short"])).code == "REQUEST_INVALID"
    assert failing(lambda: operator.plan("digits", 1, [NO_SUCH] * 4097)).code == "LIMIT_EXCEEDED"
    assert failing(lambda: operator.plan("digits", 1, wait_ms=30_001)).code == "LIMIT_EXCEEDED"


def test_describe_accounts_for_every_byte_of_the_target(operator: Operator) -> None:
    push_both(operator)
    offer = operator.plan("digits", 2, [digest_bytes(OLD)]).files[0].delta
    request = diff_pb2.DescribeRequest(base_digest=digest_bytes(OLD), target_digest=digest_bytes(NEW))
    table = operator.diff.Describe(request)
    assert (table.delta_digest, table.delta_size) == (offer.digest, offer.size)
    assert (table.base_size, table.target_size) == (len(OLD), len(NEW))
    assert sum(region.target_length for region in table.regions) == len(NEW)
    offsets = [region.target_offset for region in table.regions]
    assert offsets == sorted(offsets)
    tensors = [
        region for region in table.regions if region.name and region.instruction in ("tensor", "program")
    ]
    assert {region.dtype for region in tensors} == {"float32"}


def test_describe_builds_what_nobody_asked_for_yet(operator: Operator) -> None:
    operator.push("digits", 1, OLD)
    operator.push("letters", 1, NEW)
    request = diff_pb2.DescribeRequest(base_digest=digest_bytes(OLD), target_digest=digest_bytes(NEW))
    assert failing(lambda: operator.diff.Describe(request)).code == "DELTA_NOT_READY"

    def ready() -> bool:
        try:
            return bool(operator.diff.Describe(request).delta_size)
        except Exception:  # noqa: BLE001 - not yet
            return False

    eventually(ready, "the delta")
    unknown = diff_pb2.DescribeRequest(target_digest=NO_SUCH)
    assert failing(lambda: operator.diff.Describe(unknown)).code == "FILE_UNKNOWN"


def external_onnx(directory: Path, drift: float) -> tuple[bytes, bytes]:
    """A model whose one matrix lies in `weights.bin`: the model file and that file."""
    weights = np.random.default_rng(5).normal(size=(256, 128)).astype(np.float32)
    weights += np.random.default_rng(6).normal(scale=drift or 1.0, size=weights.shape) * (drift > 0)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "external",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 256])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 128])],
        [onnx.numpy_helper.from_array(weights.astype(np.float32), "weights")],
    )
    directory.mkdir()
    onnx.save(
        onnx.helper.make_model(graph),
        directory / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return (directory / "model.onnx").read_bytes(), (directory / "weights.bin").read_bytes()


def test_external_data_is_diffed_by_its_tensors(operator: Operator, tmp_path: Path) -> None:
    """The bytes of external data say nothing of tensors; the model beside them does."""
    model, old = external_onnx(tmp_path / "old", 0)
    _, new = external_onnx(tmp_path / "new", 1e-4)
    operator.push("big", 1, model, ("weights.bin", "external", old))
    operator.push("big", 2, model, ("weights.bin", "external", new))
    plan = operator.plan("big", 2, [digest_bytes(model), digest_bytes(old)])
    assert sorted(how(plan)) == ["delta", "have"]  # type: ignore[type-var]
    request = diff_pb2.DescribeRequest(base_digest=digest_bytes(old), target_digest=digest_bytes(new))
    described = operator.diff.Describe(request)
    assert [(region.name, region.instruction) for region in described.regions if region.name] == [
        ("weights", "program")
    ]
    base = tmp_path / "base"
    base.write_bytes(old)
    offer = next(file.delta for file in plan.files if file.WhichOneof("how") == "delta")
    assert apply(base, operator.fetch(offer.digest, tmp_path / "delta"), tmp_path / "out") == digest_bytes(
        new
    )
