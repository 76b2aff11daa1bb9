"""The threads under gRPC's handlers: every call runs once, its end is told, and idle threads keep nothing."""

from __future__ import annotations

import threading
import weakref

import pytest

from agent.thread_pool import ThreadPool
from edge_tests.harness import serving


class Held:
    """A call that runs until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = threading.Event()

    def __call__(self) -> None:
        self.running.set()
        assert self.go.wait(20)


def test_calls_over_the_number_of_threads_wait_in_order() -> None:
    pool = ThreadPool(2, "test")
    held = [Held(), Held()]
    for each in held:
        pool.submit(each)
    ran: list[int] = []
    over = threading.Event()
    for number in range(50):
        pool.submit(ran.append, number)
    pool.submit(over.set)
    assert all(each.running.wait(20) for each in held)
    assert not ran
    held[0].go.set()
    assert over.wait(20)
    assert ran == list(range(50))
    held[1].go.set()
    pool.shutdown()


def test_an_idle_thread_is_used_again() -> None:
    pool = ThreadPool(8, "test")
    seen = set()
    for _ in range(20):
        pool.submit(lambda: seen.add(threading.get_ident()))
        serving.eventually(lambda: seen and len(pool._idle) == 1, "the thread is idle")
        assert pool._started == 1
    assert len(seen) == 1
    pool.shutdown()


def test_the_end_is_told_once_also_to_who_asks_late_and_after_a_defect() -> None:
    pool = ThreadPool(1, "test")
    told: list[str] = []
    held = Held()
    call = pool.submit(held)
    call.add_done_callback(lambda _: told.append("early"))
    held.go.set()
    serving.eventually(lambda: told == ["early"], "the end is told")
    call.add_done_callback(lambda _: told.append("late"))
    assert told == ["early", "late"]
    broken = pool.submit(lambda: 1 / 0)
    broken.add_done_callback(lambda _: told.append("broken"))
    serving.eventually(lambda: told == ["early", "late", "broken"], "so is that of a call that raised")
    after = threading.Event()
    pool.submit(after.set)
    assert after.wait(20)
    pool.shutdown()


def test_an_idle_thread_keeps_no_call_alive() -> None:
    class Argument:
        pass

    pool = ThreadPool(1, "test")
    argument = Argument()
    gone = weakref.ref(argument)
    pool.submit(id, argument)
    del argument
    serving.eventually(lambda: gone() is None, "nothing refers to it")
    pool.shutdown()


def test_shutdown_finishes_what_was_taken_and_ends_the_threads() -> None:
    before = threading.active_count()
    pool = ThreadPool(2, "test")
    held, idle, ran = Held(), threading.Event(), threading.Event()
    pool.submit(idle.set)
    pool.submit(held)
    assert idle.wait(20)
    assert held.running.wait(20)
    pool.submit(ran.set)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="ending"):
        pool.submit(ran.set)
    held.go.set()
    assert ran.wait(20)
    serving.eventually(lambda: threading.active_count() <= before, "the threads ended")
