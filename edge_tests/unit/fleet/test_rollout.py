"""The rollout state machine, explored without I/O: every order of reports, time and aborts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet import rollout as machine
from fleet.rollout import ABORTED, DONE, FAILED, RUNNING, UPDATING, WAITING, Goal, Member, Outcome, Rollout
from sluice.api.v1 import errors_pb2, rollouts_pb2, sync_pb2

SUCCEEDED, FELL, STOPPED = (
    rollouts_pb2.ROLLOUT_STATE_SUCCEEDED,
    rollouts_pb2.ROLLOUT_STATE_FAILED,
    rollouts_pb2.ROLLOUT_STATE_ABORTED,
)
GOAL = Goal("digits", 2, "sha256:manifest", {"onnx": "sha256:onnx", "tflite": "sha256:tflite"})
DEADLINE_US = 1_000
GENERATION = 7


def start(count: int, *, max_failed_percent: int = 0, from_version: int = 1) -> Rollout:
    members = {f"box-{index}": Member(f"box-{index}", GENERATION, from_version) for index in range(count)}
    phase = rollouts_pb2.Phase(deadline_s=60, max_failed_percent=max_failed_percent)
    return Rollout("r", GOAL, phase, created_us=0, deadline_us=DEADLINE_US, members=members)


def entry(**fields: Any) -> sync_pb2.ReportedModel:
    """A device that runs the goal in health, but for `fields`."""
    return sync_pb2.ReportedModel(
        **{
            "model": "digits",
            "active_version": 2,
            "active_manifest_digest": "sha256:manifest",
            "variant": "onnx",
            "loaded_digests": ["sha256:labels", "sha256:onnx"],
            "healthy": True,
            "step": sync_pb2.UPDATE_STEP_COMMITTED,
            **fields,
        }
    )


def failure(*, final: bool, version: int = 2) -> sync_pb2.ReportedModel:
    return entry(
        active_version=1,
        active_manifest_digest="sha256:old",
        step=sync_pb2.UPDATE_STEP_FAILED,
        failure=sync_pb2.UpdateFailure(
            version=version, reason=errors_pb2.GOLDEN_MISMATCH, message="cosine 0.2", final=final
        ),
    )


def says(*models: sync_pb2.ReportedModel, generation: int = GENERATION) -> sync_pb2.ReportedState:
    return sync_pb2.ReportedState(desired_generation=generation, models=models)


def after(state: Rollout, model: sync_pb2.ReportedModel, generation: int = GENERATION) -> Outcome:
    return machine.reported(state, {"box-0": says(model, generation=generation)}, 10)


def test_a_device_is_done_when_it_says_what_it_runs() -> None:
    outcome = after(start(2), entry())
    assert outcome.rollout.members["box-0"].state == DONE
    assert outcome.rollout.members["box-0"].ended_us == 10
    assert outcome.changed == {"box-0"}
    assert outcome.rollout.state == RUNNING
    assert (
        machine.reported(outcome.rollout, {"box-1": says(entry(variant="tflite"))}, 11)
        .rollout.members["box-1"]
        .state
        == UPDATING
    )  # the variant's own model file is not among the loaded ones


@pytest.mark.parametrize(
    "lacking",
    [
        {"active_version": 1},
        {"active_manifest_digest": "sha256:other"},
        {"healthy": False},
        {"loaded_digests": []},
        {"loaded_digests": ["sha256:labels"]},
        {"variant": "unheard-of"},
        {"model": "letters"},
        {"step": sync_pb2.UPDATE_STEP_ACTIVATING},
        {"step": sync_pb2.UPDATE_STEP_SOAKING},
    ],
)
def test_a_device_that_lacks_any_of_it_is_not_done(lacking: dict[str, Any]) -> None:
    assert after(start(1), entry(**lacking)).rollout.members["box-0"].state == UPDATING


def test_a_report_older_than_the_rollout_proves_nothing() -> None:
    for model in (entry(), failure(final=True)):
        assert after(start(1), model, GENERATION - 1).rollout == start(1)


def test_done_reopens_when_the_device_falls_back() -> None:
    done = after(start(2), entry()).rollout
    assert done.members["box-0"].state == DONE
    sick = after(done, entry(healthy=False)).rollout
    assert (sick.members["box-0"].state, sick.members["box-0"].ended_us) == (UPDATING, 0)
    assert after(sick, entry()).rollout.members["box-0"].state == DONE


def test_a_failure_counts_when_it_is_final_and_of_this_version() -> None:
    trying = after(start(2), failure(final=False)).rollout.members["box-0"]
    assert (trying.state, trying.reason, trying.message) == (
        UPDATING,
        errors_pb2.GOLDEN_MISMATCH,
        "cosine 0.2",
    )
    other = after(start(2), failure(final=True, version=1)).rollout.members["box-0"]
    assert (other.state, other.reason) == (UPDATING, errors_pb2.ERROR_REASON_UNSPECIFIED)
    failed = after(start(2, max_failed_percent=50), failure(final=True)).rollout
    assert failed.members["box-0"].state == FAILED
    assert failed.state == RUNNING


def test_too_many_failures_end_it_and_send_back_all_that_are_not_done() -> None:
    state = machine.reported(start(3), {"box-1": says(entry())}, 5).rollout
    outcome = after(state, failure(final=True))
    assert outcome.rollout.state == FELL
    assert "1 of 3 devices done, 1 failed" in outcome.rollout.verdict
    assert outcome.send_back == {"box-0", "box-2"}
    assert outcome.rollout.members["box-2"].state == ABORTED


def test_the_deadline_fails_silent_and_unfinished_devices() -> None:
    fetching = entry(active_version=1, target_version=2, step=sync_pb2.UPDATE_STEP_FETCHING)
    state = after(start(3, max_failed_percent=100), fetching).rollout
    state = machine.reported(state, {"box-1": says(entry())}, 5).rollout
    assert machine.tick(state, DEADLINE_US - 1).rollout == state
    ended = machine.tick(state, DEADLINE_US).rollout
    unfinished, done, silent = (ended.members[f"box-{index}"] for index in range(3))
    assert (unfinished.state, unfinished.reason) == (FAILED, errors_pb2.DEVICE_SILENT)
    assert "FETCHING" in unfinished.message
    assert done.state == DONE
    assert (silent.state, silent.reason) == (FAILED, errors_pb2.DEVICE_SILENT)
    assert ended.state == SUCCEEDED  # one of three got there, and all failures were allowed


def test_a_deadline_within_the_soak_is_told_so() -> None:
    state = after(start(1), entry(step=sync_pb2.UPDATE_STEP_SOAKING)).rollout
    ended = machine.tick(state, DEADLINE_US).rollout.members["box-0"]
    assert ended.reason == errors_pb2.DEVICE_SILENT
    assert "still in its soak after 60 s" in ended.message


def test_what_was_fetched_for_the_version_before_is_not_this_rollouts() -> None:
    before = entry(
        active_version=1, active_manifest_digest="sha256:old", fetched_bytes=5, fetch_total_bytes=5
    )
    member = after(start(2), before).rollout.members["box-0"]
    assert (member.state, member.fetched_bytes, member.fetch_total_bytes) == (UPDATING, 0, 0)
    assert member.step == sync_pb2.UPDATE_STEP_UNSPECIFIED


def test_a_rollout_that_no_device_finished_is_no_success() -> None:
    assert machine.tick(start(2, max_failed_percent=100), DEADLINE_US).rollout.state == FELL


@pytest.mark.parametrize(("revert", "back"), [(False, {"box-1"}), (True, {"box-0", "box-1"})])
def test_an_abort_sends_devices_back(revert: bool, back: set[str]) -> None:
    state = after(start(2), entry()).rollout
    outcome = machine.abort(state, revert=revert, why="a hunch", now_us=20)
    assert outcome.rollout.state == STOPPED
    assert "a hunch" in outcome.rollout.verdict
    assert outcome.send_back == back
    assert machine.abort(outcome.rollout, revert=True, why="", now_us=21) == Outcome(outcome.rollout)


def test_a_device_that_ran_the_version_before_is_not_sent_back() -> None:
    assert not machine.abort(start(2, from_version=2), revert=True, why="", now_us=1).send_back


REPORTS = st.sampled_from(
    [
        entry(),
        entry(healthy=False),
        entry(step=sync_pb2.UPDATE_STEP_SOAKING),
        entry(active_version=1, step=sync_pb2.UPDATE_STEP_FETCHING, fetched_bytes=10, fetch_total_bytes=20),
        entry(loaded_digests=["sha256:other"]),
        entry(active_version=1, pinned_version=1),
        failure(final=False),
        failure(final=True),
        failure(final=True, version=1),
        sync_pb2.ReportedModel(model="letters"),
    ]
)
EVENTS = st.one_of(
    st.tuples(
        st.just("report"),
        st.dictionaries(
            st.sampled_from(["box-0", "box-1", "box-2", "box-3", "stranger"]),
            st.tuples(REPORTS, st.sampled_from([GENERATION - 1, GENERATION, GENERATION + 1])),
            min_size=1,
        ),
    ),
    st.tuples(st.just("tick"), st.integers(1, 400)),
    st.tuples(st.just("abort"), st.booleans()),
)


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([0, 25, 50, 99, 100]),
    st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.just(None)), min_size=4, max_size=4),
    st.lists(EVENTS, max_size=12),
)
def test_whatever_happens_the_rules_hold(
    count: int, percent: int, origins: list[tuple[int, None]], events: list[tuple[str, Any]]
) -> None:
    state = start(count, max_failed_percent=percent)
    state = replace(
        state,
        members={
            name: replace(member, from_version=origins[index][0])
            for index, (name, member) in enumerate(state.members.items())
        },
    )
    now, last = 0, {}
    for kind, argument in events:
        before = state
        now += 1
        if kind == "report":
            reports = {name: says(model, generation=number) for name, (model, number) in argument.items()}
            outcome = machine.reported(state, reports, now)
            assert (
                machine.reported(outcome.rollout, reports, now).rollout == outcome.rollout
            )  # a repeat is harmless
            if before.state == RUNNING:
                last.update({name: pair for name, pair in argument.items() if pair[1] >= GENERATION})
        elif kind == "tick":
            now += argument
            outcome = machine.tick(state, now)
        else:
            outcome = machine.abort(state, revert=argument, why="", now_us=now)
        state = outcome.rollout
        check(before, outcome, now, percent, last, kind, argument)
    ended = machine.tick(state, DEADLINE_US + now).rollout
    assert ended.state != RUNNING  # nothing runs for ever


def check(
    before: Rollout, outcome: Outcome, now: int, percent: int, last: dict[str, Any], kind: str, argument: Any
) -> None:
    state = outcome.rollout
    members = state.members
    assert set(members) == set(before.members)
    differing = {name for name in members if members[name] != before.members[name]}
    assert differing == set(outcome.changed)
    if before.state != RUNNING:
        assert outcome == Outcome(before)  # the end is the end
        return
    for name, member in members.items():
        if before.members[name].state in (FAILED, ABORTED):
            assert member == before.members[name]
        if member.state == DONE:
            assert last[name][0] == entry()  # by its own word, and its latest
        assert (member.ended_us > 0) == (member.state in (DONE, FAILED, ABORTED))
    failed, done = state.count(FAILED), state.count(DONE)
    waiting = state.count(WAITING) + state.count(UPDATING)
    if state.state == RUNNING:
        assert failed * 100 <= percent * len(members)
        assert waiting
        assert not outcome.send_back
        assert kind != "tick" or now < state.deadline_us
    else:
        assert not waiting
        assert state.ended_us == now
        assert state.verdict
    if state.state == SUCCEEDED:
        assert done
        assert done + failed == len(members)
        assert failed * 100 <= percent * len(members)
        assert not outcome.send_back
    revert = kind == "abort" and argument
    if state.state in (FELL, STOPPED):
        assert outcome.send_back == {
            name
            for name, member in members.items()
            if member.from_version != 2 and (revert or member.state != DONE)
        }
