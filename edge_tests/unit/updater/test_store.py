"""The content-addressed store: only right bytes get in, nothing half-written is ever seen."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sluice.api.v1 import errors_pb2
from updater.atomic import replace_atomic, write_atomic
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.store import Store

CONTENT = b"weights" * 1000
DIGEST = digest_bytes(CONTENT)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def everything(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_add_copy_move_and_twice(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(CONTENT)
    assert store.add_file(source) == DIGEST
    assert source.exists()
    assert store.path(DIGEST).read_bytes() == CONTENT
    staged = store.staging("incoming")
    shutil.copyfile(source, staged)
    assert store.add_file(staged, digest=DIGEST, move=True) == DIGEST
    assert not staged.exists()
    assert list(store.digests()) == [DIGEST]
    assert store.size_bytes() == len(CONTENT)
    assert store.path(DIGEST).stat().st_mode & 0o777 == 0o444
    assert store.add_bytes(CONTENT) == DIGEST
    assert everything(store.root) == [store.path(DIGEST)]


def test_wrong_digest_changes_nothing(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(CONTENT)
    with pytest.raises(SluiceError) as caught:
        store.add_file(source, digest=digest_bytes(b"other"))
    assert caught.value.reason == errors_pb2.FILE_DIGEST_MISMATCH
    assert everything(store.root) == []


def test_damage_is_found_and_set_aside(store: Store) -> None:
    path = store.path(store.add_bytes(CONTENT))
    path.chmod(0o644)
    damaged = bytearray(CONTENT)
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(SluiceError) as caught:
        store.verify(DIGEST)
    assert caught.value.reason == errors_pb2.STORE_CORRUPT
    assert not store.has(DIGEST)
    assert list(store.digests()) == []
    assert store.add_bytes(CONTENT) == DIGEST
    assert store.verify(DIGEST) == path


def test_keys_and_staging_names_cannot_leave_the_store(store: Store) -> None:
    for key in ("", "sha256:..", "../../etc/passwd", "sha256:" + "A" * 64, DIGEST + "\n"):
        with pytest.raises(SluiceError):
            store.path(key)
    for name in ("", "../x", "a/b", ".x"):
        with pytest.raises(SluiceError):
            store.staging(name)
    with pytest.raises(SluiceError) as caught:
        store.require(DIGEST)
    assert caught.value.reason == errors_pb2.FILE_UNKNOWN


def test_equal_writers_at_once(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(CONTENT)
    failures: list[BaseException] = []

    def add() -> None:
        try:
            store.add_file(source)
        except BaseException as error:  # noqa: BLE001 - collected for the assertion
            failures.append(error)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert everything(store.root) == [store.path(DIGEST)]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        store = Store(small / "store")
        source = tmp_path / "model.onnx"
        source.write_bytes(os.urandom(200_000))
        with pytest.raises(SluiceError) as caught:
            store.add_file(source)
        assert caught.value.reason == errors_pb2.DISK_FULL
        with pytest.raises(SluiceError) as caught:
            store.add_bytes(os.urandom(200_000))
        assert caught.value.reason == errors_pb2.DISK_FULL
        assert everything(store.root) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "link to a pipe"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    """As root, `-o /dev/null` would otherwise take /dev/null from the whole machine."""
    target = tmp_path / "out"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if kind == "pipe":
        target = pipe
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(target))
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to(pipe)
    before = target.lstat()
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    for write in (lambda: write_atomic(target, CONTENT), lambda: replace_atomic(source, target)):
        with pytest.raises(SluiceError) as caught:
            write()
        assert caught.value.reason == errors_pb2.IO_FAILED
    assert target.lstat() == before
    assert source.exists()


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "private"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    target.chmod(0o600)
    replace_atomic(source, target)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600


WRITER = """
import sys
from pathlib import Path
from updater.atomic import write_atomic
write_atomic(Path(sys.argv[1]), b"new" * 5000)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="Debian package missing: strace")
@pytest.mark.parametrize("call", ["write", "fsync", "rename,renameat,renameat2"])
@pytest.mark.parametrize("effect", ["error=EIO", "signal=SIGKILL"])
def test_atomic_write_is_old_or_new_whatever_fails(tmp_path: Path, call: str, effect: str) -> None:
    """Each system call of the write fails or kills the process; the name holds old or new content whole."""
    target = tmp_path / "state"
    write_atomic(target, b"old")
    seen = set()
    for when in range(1, 4):
        command = ["strace", "-f", "-qq", "-o", "/dev/null"]
        command += ["-e", f"inject={call}:{effect}:when={when}"]
        done = subprocess.run(
            [*command, sys.executable, "-c", WRITER, str(target)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if "strace:" in done.stderr and "ptrace" in done.stderr:
            pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
        content = target.read_bytes()
        assert content in (b"old", b"new" * 5000)
        seen.add(content)
        write_atomic(target, b"old")
    if effect.startswith("error"):
        assert b"old" in seen
