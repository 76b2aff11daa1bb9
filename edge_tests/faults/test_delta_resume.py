"""Applying through kills, cut links, a full disk and tampering: it resumes or starts over, and is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from updater import delta
from updater.delta.journal import journal_path, tail_path
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.limits import DecodeLimits

BLOCK = 4096
SIZE = 10 * BLOCK + 77
HEADER_BYTES = 160  # at least: what breaks within the header is fetched from its beginning


class Case:
    """A base, a target and the delta between them, on disk."""

    def __init__(self, directory: Path, ahead: int) -> None:
        self.ahead = ahead
        random = np.random.default_rng(7)
        old = random.integers(0, 256, SIZE, dtype=np.uint8)
        new = old.copy()
        new[::3] += random.integers(0, 3, len(new[::3]), dtype=np.uint8)
        self.base, self.delta, self.partial = directory / "base", directory / "delta", directory / "partial"
        self.target = new.tobytes()
        self.base.write_bytes(old.tobytes())
        (directory / "target").write_bytes(self.target)
        options = delta.EncodeOptions(level=3, block_size=BLOCK, effort="fast")
        delta.create(self.base, directory / "target", self.delta, options=options)
        self.data = self.delta.read_bytes()

    def applier(self, *, delta_digest: str = "") -> delta.Applier:
        return delta.Applier(
            self.base,
            self.partial,
            expected_target=digest_bytes(self.target),
            expected_size=len(self.target),
            delta_digest=delta_digest,
            sync_bytes=2 * BLOCK,
            limits=DecodeLimits(blocks_ahead=self.ahead),
        )

    def run(self, step: int = 1000) -> int:
        """Applies from where the partial stands to the end; gives the offset it resumed at."""
        with self.applier() as applier:
            resumed = start = applier.resume_offset
            while start < len(self.data):
                applier.feed(self.data[start : start + step])
                start += step
            assert applier.finish() == digest_bytes(self.target)
        assert self.partial.read_bytes() == self.target
        assert not journal_path(self.partial).exists()
        return resumed


@pytest.fixture(params=[0, 1], ids=["in turn", "ahead"])
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return Case(tmp_path, request.param)


def in_killed_child(work: Callable[[], None]) -> bool:
    """Runs `work` in a forked process; True if it died of SIGKILL, False if it got to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_kill_after_any_number_of_bytes(case: Case) -> None:
    resumed = []
    for stop in range(1, len(case.data), len(case.data) // 40):

        def work(stop: int = stop) -> None:
            applier = case.applier()
            applier.feed(case.data[:stop])
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_killed_child(work)
        resumed.append(case.run())
        assert resumed[-1] <= stop
        case.partial.unlink()
    if not case.ahead:  # else it is a race which blocks were written in time
        assert resumed == sorted(resumed)
        assert len(set(resumed)) == 6  # every second block of eleven, and the start


def test_kill_at_every_system_call_that_changes_the_disk(case: Case) -> None:
    """SIGKILL before the n-th write, fsync, rename or removal, for every n: nothing is ever lost or wrong."""
    number = 0
    killed = True
    while killed:
        number += 1

        def work(number: int = number) -> None:
            count = 0

            def killing(name: str) -> None:
                real = getattr(os, name)

                def call(*args: object, **kwargs: object) -> object:
                    nonlocal count
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                setattr(os, name, call)

            for name in ("write", "fsync", "replace", "unlink", "ftruncate"):
                killing(name)
            case.run()

        killed = in_killed_child(work)
        if killed:
            case.run()
        case.partial.unlink()
    assert number > 30


def test_kill_during_resume_too(case: Case) -> None:
    """A process that dies again and again still gets there, block by block."""
    for _ in range(30):

        def work() -> None:
            applier = case.applier()
            start = applier.resume_offset
            applier.feed(case.data[start : start + len(case.data) // 4])
            os.kill(os.getpid(), signal.SIGKILL)

        in_killed_child(work)
    assert case.run() > len(case.data) // 2


def test_close_keeps_the_last_whole_block(case: Case) -> None:
    with case.applier() as applier:
        applier.feed(case.data[: len(case.data) // 2])
        fed = applier.resume_offset
        blocks = applier.target_offset
        assert fed == len(case.data) // 2
    with case.applier() as applier:
        assert applier.target_offset >= blocks  # what was decoded ahead is written by `close`
        assert fed - len(case.data) // 10 <= applier.resume_offset <= fed
    case.run()


def test_a_cut_loses_nothing_that_had_arrived(case: Case) -> None:
    """Also a link that breaks within every block gets on: byte by byte at worst."""
    fed = 0
    for stop in range(HEADER_BYTES, len(case.data), 97):
        with case.applier() as applier:
            assert applier.resume_offset == fed
            applier.feed(case.data[fed:stop])
            fed = stop
    assert case.run() == fed
    assert not tail_path(case.partial).exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "of another offset"])
def test_a_tail_that_does_not_fit_is_fetched_again(case: Case, damage: str) -> None:
    with case.applier() as applier:
        applier.feed(case.data[: len(case.data) // 2])
    tail = tail_path(case.partial)
    data = bytearray(tail.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    elif damage == "cut":
        del data[-1]
    else:
        data[0] ^= 1
    tail.write_bytes(data)
    with case.applier() as applier:
        assert 0 < applier.resume_offset < len(case.data) // 2
    case.run()


def test_finished_but_not_yet_taken_away(case: Case) -> None:
    """Killed between finish and the move into the store: only the end marker is fetched again."""

    def work() -> None:
        applier = case.applier()
        applier.feed(case.data)
        applier.finish()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_killed_child(work)
    assert case.run() == len(case.data) - 1


def half_done(case: Case, *, delta_digest: str = "") -> None:
    with case.applier(delta_digest=delta_digest) as applier:
        applier.feed(case.data[: len(case.data) // 2])
    with case.applier(delta_digest=delta_digest) as applier:
        assert applier.resume_offset > 0


def change_journal(case: Case, **changes: object) -> None:
    path = journal_path(case.partial)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


TAMPERING: dict[str, Callable[[Case], object]] = {
    "partial flipped": lambda case: flip(case.partial),
    "partial cut": lambda case: os.truncate(case.partial, BLOCK),
    "partial gone": lambda case: case.partial.unlink(),
    "journal empty": lambda case: journal_path(case.partial).write_bytes(b""),
    "journal binary": lambda case: journal_path(case.partial).write_bytes(os.urandom(500)),
    "journal huge": lambda case: journal_path(case.partial).write_bytes(b"[" * 200_000),
    "journal not an object": lambda case: journal_path(case.partial).write_bytes(b"[1]"),
    "other version": lambda case: change_journal(case, version=9),
    "no header": lambda case: change_journal(case, header=""),
    "flipped header": lambda case: change_journal(case, header="AAAA"),
    "negative": lambda case: change_journal(case, target_offset=-1),
    "too far": lambda case: change_journal(case, target_offset=SIZE * 2),
    "a float": lambda case: change_journal(case, blocks=1.5),
    "too many blocks": lambda case: change_journal(case, blocks=99),
    "other prefix": lambda case: change_journal(case, prefix_digest="00" * 32),
    "prefix no text": lambda case: change_journal(case, prefix_digest=None),
}


@pytest.mark.parametrize("tamper", TAMPERING.values(), ids=TAMPERING.keys())
def test_anything_inconsistent_starts_over(case: Case, tamper: Callable[[Case], object]) -> None:
    half_done(case)
    tamper(case)
    assert case.run() == 0


def test_another_delta_or_base_starts_over(case: Case, tmp_path: Path) -> None:
    half_done(case, delta_digest="sha256:" + "0" * 64)
    with case.applier(delta_digest="sha256:" + "1" * 64) as applier:
        assert applier.resume_offset == 0
    half_done(case)
    other = tmp_path / "other"
    other.write_bytes(b"another base")
    with delta.Applier(other, case.partial) as applier:
        assert applier.resume_offset == 0
    half_done(case)
    with delta.Applier(case.base, case.partial, expected_target="sha256:" + "0" * 64) as applier:
        assert applier.resume_offset == 0


def test_bytes_of_another_delta_after_a_resume_are_noticed(case: Case, tmp_path: Path) -> None:
    options = delta.EncodeOptions(level=1, block_size=BLOCK // 2, effort="fast")
    delta.create(case.base, tmp_path / "target", tmp_path / "delta2", options=options)
    half_done(case)
    with case.applier() as applier, pytest.raises(SluiceError, match="DELTA_"):
        applier.feed((tmp_path / "delta2").read_bytes()[applier.resume_offset :])
    assert case.run() > 0


def test_corrupted_transfer_keeps_what_was_right(case: Case) -> None:
    data = bytearray(case.data)
    data[len(data) * 3 // 4] ^= 4
    with case.applier() as applier:
        with pytest.raises(SluiceError, match="DELTA_CORRUPT"):
            applier.feed(bytes(data))
        with pytest.raises(SluiceError, match="failed"):
            applier.feed(b"more")
        with pytest.raises(SluiceError, match="failed"):
            applier.finish()
    assert case.run() > len(data) // 2


def test_two_appliers_on_one_partial(case: Case) -> None:
    with case.applier(), pytest.raises(SluiceError) as caught:
        case.applier()
    assert caught.value.code == "STATE_LOCKED"
    case.run()


def test_base_that_shrinks_while_it_is_read(case: Case) -> None:
    with case.applier() as applier:
        applier.feed(case.data[:200])
        os.truncate(case.base, 100)
        with pytest.raises(SluiceError) as caught:
            applier.feed(case.data[200:])
    assert caught.value.code == "DELTA_WRONG_BASE"


def test_partial_that_is_a_link_is_not_followed(case: Case, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    case.partial.symlink_to(tmp_path / "precious")
    with pytest.raises(SluiceError) as caught:
        case.applier()
    assert caught.value.code == "IO_FAILED"
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half of the target."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "sluice-test", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs to fill up: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_disk(case: Case, small_disk: Path) -> None:
    case.partial = small_disk / "partial"
    with case.applier() as applier:
        with pytest.raises(SluiceError) as caught:
            applier.feed(case.data)
        assert caught.value.code == "DISK_FULL"
    assert case.partial.exists()
    with case.applier() as applier:
        assert applier.resume_offset > len(case.data) // 10
        with pytest.raises(SluiceError) as caught:
            applier.feed(case.data[applier.resume_offset :])
        assert caught.value.code == "DISK_FULL"
    subprocess.run(["mount", "-o", f"remount,size={SIZE * 3}", str(small_disk)], check=True)
    assert case.run() > len(case.data) // 10


def test_full_disk_while_applying_to_a_file(case: Case, small_disk: Path) -> None:
    (small_disk / "out").write_bytes(b"old")
    with pytest.raises(SluiceError) as caught:
        delta.apply(case.base, case.delta, small_disk / "out")
    assert caught.value.code == "DISK_FULL"
    assert (small_disk / "out").read_bytes() == b"old"
    subprocess.run(["mount", "-o", f"remount,size={SIZE * 3}", str(small_disk)], check=True)
    delta.apply(case.base, case.delta, small_disk / "out")
    assert (small_disk / "out").read_bytes() == case.target
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_full_disk_while_creating(case: Case, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(SIZE * 2))
    with pytest.raises(SluiceError) as caught:
        delta.create(None, tmp_path / "noise", small_disk / "made")
    assert caught.value.code == "DISK_FULL"
    assert list(small_disk.iterdir()) == []
