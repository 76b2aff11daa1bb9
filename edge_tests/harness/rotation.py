"""Rotation under load: boxes that call and stream while every certificate is replaced again and again.

An accelerated clock: certificates live a few seconds instead of a day, so boxes renew every few seconds with
new keys, the control plane's own certificate as well; between, the intermediate and the root are rotated.
Each box has a thread that calls without pause and a Sync stream. Counted are calls that failed and streams
that did not come back. `python -m edge_tests.harness.rotation --rotations 50` is the long run (`make soak`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from agent.config import AgentConfig
from agent.control import Control
from agent.identity import BoxIdentity
from agent.sync import Sync
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.trust import now
from fleet import ca
from fleet.authority import DIRECTORY
from sluice.api.v1 import sync_pb2
from updater.errors import SluiceError
from updater.keyfile import read_key

LIFE_S = 6.0
BOXES = 6
PAUSE_S = 0.2  # between two calls of one box; the control plane takes ten a second
START_S = 60.0


@dataclass
class Outcome:
    """What became of it.

    Attributes:
        rotations: of the certificate of the box that renewed least.
        calls: that were made.
        failures: of them that failed, by reason.
        streams: opened in all.
        broken: streams that stand no more at the end, with the reason.
    """

    rotations: int = 0
    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    broken: list[str] = field(default_factory=list)


class _Box:
    def __init__(self, control: ControlPlane, directory: Path, name: str, outcome: Outcome) -> None:
        slip = control.enrolling(name)
        self.config = AgentConfig(
            control_address=control.address,
            enrolment_address=control.enrolment_address,
            device_id=name,
            control_bundle=Path(slip["control.bundle"]),
            control_token=slip["control.token"],
            state_dir=directory / name,
            reconnect_max_s=1,
        )
        self.identity = BoxIdentity(self.config)
        self.identity.enrol()
        self.connects = 0
        self._outcome = outcome
        self._stop = threading.Event()
        self.sync = Sync(
            control.address,
            identity=self.identity,
            device_id=name,
            hello=lambda: sync_pb2.Hello(device_id=name),
            reported=sync_pb2.ReportedState,
            on_desired=lambda _: None,
            on_connected=self._connected,
            poll_interval_s=60,
            reconnect_max_s=1,
        )
        self.identity.on_renewed = self.sync.renewed
        self._thread = threading.Thread(target=self._call, name=name)

    def start(self) -> None:
        self.identity.start()
        self.sync.start()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        self.identity.stop(10)
        self.sync.stop(10)

    def _connected(self) -> None:
        self.connects += 1

    def _call(self) -> None:
        control = Control(self.config.control_address, self.identity)
        request = sync_pb2.PollRequest(hello=sync_pb2.Hello(device_id=self.config.device_id))
        while not self._stop.wait(PAUSE_S):
            self._outcome.calls += 1
            try:
                control.poll(request)  # what a device may ask
            except SluiceError as error:
                self._outcome.failures[error.code] += 1
        control.close()


def rotate_under_load(directory: Path, rotations: int, life_s: float = LIFE_S) -> Outcome:
    """Runs until each box has renewed so often; on the way two intermediates and a root."""
    outcome = Outcome()
    with ExitStack() as stack:
        control = stack.enter_context(
            ControlPlane(
                directory / "control", "--certificate-life-s", str(life_s), "--disk-reserve-bytes", "0"
            )
        )
        boxes = [_Box(control, directory, f"box-{number}", outcome) for number in range(BOXES)]
        for box in boxes:
            box.start()
            stack.callback(box.stop)
        steps = {
            max(1, rotations // 4): False,
            max(2, rotations // 2): True,
            max(3, 3 * rotations // 4): False,
        }
        deadline = time.monotonic() + START_S + rotations * life_s * 3
        while (done := min(box.identity.generation for box in boxes) - 1) < rotations:
            assert time.monotonic() < deadline, (
                f"only {done} rotations: {[box.identity.error for box in boxes]}"
            )
            due = [number for number in steps if number <= done]
            for number in due:
                place = control.data / DIRECTORY
                rotate = ca.rotate_root if steps.pop(number) else ca.rotate_intermediate
                rotate(place, read_key(place / ca.ROOT_KEY), now())
            time.sleep(0.1)
        # What is away at this moment comes back, or is broken.
        until = time.monotonic() + START_S
        while time.monotonic() < until and not all(box.sync.connected for box in boxes):
            time.sleep(0.1)
        outcome.rotations = done
        outcome.streams = sum(box.connects for box in boxes)
        outcome.broken = [box.sync.error for box in boxes if not box.sync.connected or box.sync.error]
    return outcome


def main() -> int:
    """The long run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rotations", type=int, default=50)
    with tempfile.TemporaryDirectory(prefix="sluice-rotation-") as scratch:
        outcome = rotate_under_load(Path(scratch), parser.parse_args().rotations)
    print(outcome)
    return 1 if outcome.failures or outcome.broken else 0


if __name__ == "__main__":
    sys.exit(main())
