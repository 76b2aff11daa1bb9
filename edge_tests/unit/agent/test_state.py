from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.lock import StateLock
from agent.slots import Installed, Slots
from agent.state import Desired, DesiredModel, State, Update
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

ONE = Installed(1, "sha256:" + "1" * 64, "onnx", "onnxruntime")
TWO = Installed(2, "sha256:" + "2" * 64, "tflite", "litert")


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    slots = Slots("m", active=TWO, previous=ONE, staged=None, soaking=True, pinned=True)
    update = Update("m", 2, TWO.manifest_digest, 5, 9, 3, 2, errors_pb2.DISK_FULL, "full", True, True)
    desired = Desired(7, {"m": DesiredModel("m", 2, TWO.manifest_digest, "r1")})
    state.save(slots, update)
    state.save_desired(desired)
    state.close()
    again = State(tmp_path / "state.db")
    assert again.models() == {"m": slots}
    assert again.updates() == {"m": update}
    assert again.desired() == desired
    assert again.slots("unknown") == Slots("unknown")
    assert again.set_aside is None
    again.clear_update("m")
    again.save(Slots("m", active=TWO))
    assert again.updates() == {}
    assert again.slots("m") == Slots("m", active=TWO)
    again.close()


def test_settings_that_survive_a_power_cut(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    assert state._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert state._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    state.close()


def test_killed_between_writes_keeps_whole_transactions(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from agent.slots import Installed, Slots
from agent.state import State, Update
state = State(Path({str(tmp_path / "state.db")!r}))
for number in range(1, 100000):
    item = Installed(number, "sha256:" + "0" * 64, "v", "r")
    state.save(Slots("m", active=item, previous=item), Update("m", number, "d"))
    if number == 5:
        print("going", flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"going\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    state = State(tmp_path / "state.db")
    slots, update = state.slots("m"), state.updates()["m"]
    assert slots.active is not None
    assert slots.previous == slots.active
    assert update.version == slots.active.version >= 5
    state.close()


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough " * 40, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_damaged_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(content)
    state = State(path)
    assert state.set_aside == tmp_path / "state.db.damaged"
    assert state.set_aside.read_bytes() == content
    assert state.models() == {}
    state.close()


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SluiceError, match="has schema 99; this agent knows 1"):
        State(path)


def test_threads_share_it(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")

    def work(name: str) -> None:
        for number in range(1, 20):
            item = Installed(number, "sha256:" + "0" * 64, "v", "r")
            state.save(Slots(name, active=item))
            assert state.slots(name).active == item

    threads = [threading.Thread(target=work, args=(f"m{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {slots.active.version for slots in state.models().values() if slots.active} == {19}
    state.close()
    with pytest.raises(SluiceError) as caught:
        state.models()
    assert caught.value.reason == errors_pb2.IO_FAILED


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    with StateLock(tmp_path), pytest.raises(SluiceError) as caught:
        StateLock(tmp_path)
    assert caught.value.reason == errors_pb2.STATE_LOCKED
    assert str(os.getpid()) in caught.value.message
    StateLock(tmp_path).close()
