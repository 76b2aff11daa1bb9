"""Push, plan, fetch, apply: a whole update through a real control plane, in full and as a delta."""

from __future__ import annotations

from pathlib import Path

from edge_tests.harness.operator import Operator, onnx_model
from updater.delta import apply
from updater.digests import digest_bytes


def test_a_version_reaches_a_box_in_full_and_the_next_as_a_delta(operator: Operator, tmp_path: Path) -> None:
    old, new, labels = onnx_model(1), onnx_model(1, drift=1e-3), b"zero\none\n" * 2
    first = operator.push("digits", 1, old, ("labels.txt", "labels", labels))
    plan = operator.plan("digits", 1)
    assert [file.digest for file in plan.files] == [digest_bytes(old), digest_bytes(labels)]
    assert [file.WhichOneof("how") for file in plan.files] == ["full", "full"]
    box = tmp_path / "old.onnx"
    apply(None, operator.fetch(plan.files[0].full.digest, tmp_path / "full.sldelta"), box)
    assert box.read_bytes() == old

    operator.push("digits", 2, new, ("labels.txt", "labels", labels))
    held = [file.digest for file in first.variants[0].files]
    plan = operator.plan("digits", 2, held)
    model, unchanged = plan.files
    assert unchanged.WhichOneof("how") == "have"
    assert model.WhichOneof("how") == "delta"
    assert model.delta.base_digest == digest_bytes(old)
    assert model.delta.size < len(new)
    delta = operator.fetch(model.delta.digest, tmp_path / "delta.sldelta")
    assert digest_bytes(delta.read_bytes()) == model.delta.digest
    assert delta.stat().st_size == model.delta.size
    rebuilt = tmp_path / "new.onnx"
    assert apply(box, delta, rebuilt) == digest_bytes(new)
    assert rebuilt.read_bytes() == new
