"""A control plane on a thread of the test's own process, on a real port: starting one costs a tenth of a
second.

For tests of what goes over the wire where it does not matter that the other side is a process of its own;
where it does, `control.ControlPlane` is one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from edge_tests.harness import trust
from fleet.config import ControlConfig
from fleet.server import serve

START_S = 30.0
STOP_S = 20.0


class LocalControl:
    """A control plane on a thread of this process; it can be stopped and started again on the same port.

    Args:
        data: its data directory.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self.address = ""

    def start(self) -> None:
        trust.install(self.data)
        self._loop, self._ended = asyncio.new_event_loop(), threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        address = self.data / "address"
        until = time.monotonic() + START_S
        while not address.exists():
            assert self._thread.is_alive(), "the control plane ended"
            assert time.monotonic() < until, "the control plane does not listen"
            time.sleep(0.01)
        self.address = address.read_text()

    def _run(self) -> None:
        config = ControlConfig(
            self.data, self.address or "127.0.0.1:0", enrol_listen="127.0.0.1:0", disk_reserve_bytes=0
        )
        self._loop.run_until_complete(serve(config, self._stop))
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_S)
        assert not self._thread.is_alive()

    def __enter__(self) -> LocalControl:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
