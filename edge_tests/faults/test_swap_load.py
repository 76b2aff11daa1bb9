"""The benchmark of swaps and kills, short: what it proves at length must hold here too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import swaps

pytestmark = pytest.mark.e2e
RATE = 15.0  # other tests run beside this one: a full queue is not what is looked for here


def test_swaps_under_open_loop_load_fail_nothing_and_every_answer_has_one_version(tmp_path: Path) -> None:
    found = swaps.swaps(tmp_path, 20, RATE, pause_s=0.1)
    assert (found.failed, found.wrong, found.errors) == (0, 0, [])
    assert min(found.versions.values()) > 20
    assert sum(found.versions.values()) == found.requests
    assert found.memory[1] <= 1.1 * found.memory[0]  # of the twentieth to the tenth
    assert found.descriptors[1] <= found.descriptors[0] + 2
    assert len(found.changes) == 20
    assert found.inside


def test_killed_workers_cost_only_what_they_were_running(tmp_path: Path) -> None:
    found = swaps.kills(tmp_path, 5, models=5, rate=RATE, every_s=5.0)  # each model once
    assert (found.strange, found.wrong) == (0, 0)
    assert found.failed == len(found.errors) <= found.late + 10
    assert not found.late or max(found.back) > swaps.RESTART_WAIT_S  # starts take long on a busy machine
    assert max(found.back) <= 30  # the first restart waits for nothing else
    assert found.same_agent
