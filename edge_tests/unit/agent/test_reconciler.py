from __future__ import annotations

import pytest

from agent.reconciler import due, merge
from agent.reporter import Loaded, Running, compose
from agent.slots import Installed, Slots
from agent.state import Desired, DesiredModel, Update
from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError

D1, D2 = "sha256:" + "1" * 64, "sha256:" + "2" * 64
ONE, TWO = Installed(1, D1, "onnx", "onnxruntime"), Installed(2, D2, "onnx", "onnxruntime")
WANT_2 = DesiredModel("m", 2, D2, "r")


def message(generation: int, *models: tuple[str, int, str]) -> sync_pb2.DesiredState:
    entries = [
        sync_pb2.DesiredModel(model=name, version=number, manifest_digest=digest)
        for name, number, digest in models
    ]
    return sync_pb2.DesiredState(generation=generation, models=entries)


def test_what_is_due() -> None:
    assert due(WANT_2, Slots("m"), None, serving=False)
    assert due(WANT_2, Slots("m", active=ONE), None, serving=True)
    assert not due(WANT_2, Slots("m", active=TWO), None, serving=True)
    assert due(WANT_2, Slots("m", active=TWO), None, serving=False)  # damaged: install it again
    assert not due(WANT_2, Slots("m", active=ONE, pinned=True), None, serving=True)
    failed = Update("m", 2, D2, reason=errors_pb2.GOLDEN_MISMATCH, final=True)
    assert not due(WANT_2, Slots("m", active=ONE), failed, serving=True)
    assert due(DesiredModel("m", 1, D1), Slots("m", active=TWO), failed, serving=True)
    trying = Update("m", 2, D2, reason=errors_pb2.DISK_FULL)
    assert due(WANT_2, Slots("m", active=ONE), trying, serving=True)


def test_desired_state_is_taken_whole_and_only_forwards() -> None:
    before = Desired(5, {"m": DesiredModel("m", 1, D1), "n": DesiredModel("n", 1, D1)})
    after = merge(before, message(6, ("m", 2, D2)))
    assert after is not None
    assert set(after.models) == {"m"}
    assert merge(after, message(6, ("m", 2, D2))) is None
    assert merge(after, message(5, ("m", 1, D1))) is None


@pytest.mark.parametrize("entry", [("UPPER", 1, D1), ("../m", 1, D1), ("m", 0, D1), ("m", 1, "sha256:12")])
def test_malformed_desired_state_is_refused(entry: tuple[str, int, str]) -> None:
    with pytest.raises(SluiceError) as caught:
        merge(Desired(), message(1, entry))
    assert caught.value.reason == errors_pb2.REQUEST_INVALID


def test_too_many_models_are_refused() -> None:
    with pytest.raises(SluiceError) as caught:
        merge(Desired(), message(1, *((f"m{n}", 1, D1) for n in range(257))))
    assert caught.value.reason == errors_pb2.LIMIT_EXCEEDED


def report(slots: Slots, update: Update | None = None, **more: object) -> sync_pb2.ReportedModel:
    running, loaded = more.get("running"), more.get("loaded")
    state = compose(
        Desired(3),
        {"m": slots},
        {"m": update} if update else {},
        {"m": running} if isinstance(running, Running) else {},
        {"m": loaded} if isinstance(loaded, Loaded) else {},
        1.5,
    )
    assert state.desired_generation == 3
    assert state.time.ToNanoseconds() == 1_500_000_000
    (model,) = state.models
    return model


def test_report_says_what_is_loaded_not_what_the_slots_say() -> None:
    model = report(Slots("m", active=TWO, previous=ONE), loaded=Loaded(ONE, (D1,), False))
    assert (model.active_version, model.active_manifest_digest, model.healthy) == (1, D1, False)
    assert list(model.loaded_digests) == [D1]
    assert report(Slots("m", active=TWO)).active_version == 0


def test_report_of_steps() -> None:
    done = Update("m", 2, D2, fetched_bytes=7, total_bytes=7)
    active = Slots("m", active=TWO, previous=ONE)
    assert report(active, done).step == sync_pb2.UPDATE_STEP_COMMITTED
    assert report(active, done).fetched_bytes == 7
    assert report(active).step == sync_pb2.UPDATE_STEP_UNSPECIFIED
    assert report(Slots("m", active=TWO, soaking=True), done).step == sync_pb2.UPDATE_STEP_SOAKING
    running = report(active, done, running=Running(3, sync_pb2.UPDATE_STEP_FETCHING, 1, 9))
    assert (running.step, running.target_version) == (sync_pb2.UPDATE_STEP_FETCHING, 3)
    assert (running.fetched_bytes, running.fetch_total_bytes) == (1, 9)
    failed = Update("m", 2, D2, attempts=2, reason=errors_pb2.GOLDEN_MISMATCH, message="worse", final=True)
    model = report(Slots("m", active=ONE), failed)
    assert model.step == sync_pb2.UPDATE_STEP_FAILED
    assert (model.failure.version, model.failure.attempts, model.failure.final) == (2, 2, True)
    back = Update("m", 2, D2, reason=errors_pb2.WORKER_DIED, final=True, reverted=True)
    assert report(Slots("m", active=ONE), back).step == sync_pb2.UPDATE_STEP_REVERTED
    pinned = report(Slots("m", active=ONE, pinned=True), Update("m", 2, D2, final=True, reverted=True))
    assert pinned.pinned_version == 1
    assert not pinned.HasField("failure")
