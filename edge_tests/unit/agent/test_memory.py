from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from agent.limits import LOADED_BYTES_PER_FILE_BYTE, WORKER_BASE_BYTES
from agent.memory import available_bytes, box_bytes, estimate
from benchmarks import cgroup

MB = 1 << 20


def group(path: Path, limit: str, usage: int, cache: int, *, v1: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (path / names[0]).write_text(limit + "\n")
    (path / names[1]).write_text(f"{usage}\n")
    name = "total_inactive_file" if v1 else "inactive_file"
    (path / "memory.stat").write_text(f"anon 5\n{name} {cache}\n")


def test_the_tightest_group_above_us_counts_without_its_cache(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/system.slice/sluice.service\n")
    group(root / "system.slice" / "sluice.service", "max", 50 * MB, 0)
    group(root / "system.slice", str(100 * MB), 90 * MB, 30 * MB)
    assert available_bytes(root, own) == 40 * MB
    assert box_bytes(root, own) == 100 * MB
    group(root / "system.slice" / "sluice.service", str(60 * MB), 50 * MB, 0)
    assert available_bytes(root, own) == 10 * MB
    group(root / "system.slice" / "sluice.service", str(60 * MB), 70 * MB, 0)
    assert available_bytes(root, own) == 0


def test_groups_of_the_first_kind(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n")
    group(root / "memory" / "box", str(64 * MB), 60 * MB, 8 * MB, v1=True)
    group(root / "memory", str((1 << 63) - 4096), 60 * MB, 0, v1=True)
    assert available_bytes(root, own) == 12 * MB
    assert box_bytes(root, own) == 64 * MB


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    found = available_bytes(tmp_path, tmp_path / "none")
    assert 0.5 < found / psutil.virtual_memory().available < 2
    assert available_bytes() > 0
    assert box_bytes(tmp_path, tmp_path / "none") == psutil.virtual_memory().total


def test_a_worker_is_estimated_from_the_one_before_it() -> None:
    assert estimate(10 * MB, 10 * MB, 90 * MB) == 90 * MB
    assert estimate(15 * MB, 10 * MB, 90 * MB) == 90 * MB + 5 * MB * LOADED_BYTES_PER_FILE_BYTE
    assert estimate(5 * MB, 10 * MB, 90 * MB) == 90 * MB
    assert estimate(5 * MB, 0, 0) == WORKER_BASE_BYTES + 5 * MB * LOADED_BYTES_PER_FILE_BYTE


def test_the_kernels_own_limit_is_seen() -> None:
    if why := cgroup.missing():
        pytest.skip(why)
    limit = 200 * MB
    with cgroup.MemoryLimit(limit) as group_:
        told = subprocess.run(
            [sys.executable, "-c", "from agent import memory; print(memory.available_bytes())"],
            stdout=subprocess.PIPE,
            check=True,
            preexec_fn=group_.enter,
        )
    assert limit / 2 < int(told.stdout) < limit
