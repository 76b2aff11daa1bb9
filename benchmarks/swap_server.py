"""The box for benchmarks.swaps, as a process of its own: told what to do on stdin, a JSON line each.

    python -m benchmarks.swap_server DIRECTORY '{"models": [m, …], "versions": {"1": path, …}, "golden": {…}}'

prints {"address": …} once every model serves version 1, then answers
    {"op": "swap", "model": m, "version": n}  with {"began": s, "turned": s, "ended": s} (CLOCK_MONOTONIC):
        from the beginning of the activation to the end of the soak and of the old worker
    {"op": "workers"}                         with {"workers": {model: pid}}
and ends with its standard input. It is the agent's serving half: front, router, workers, supervisor, slots on
disk, and activation with golden inputs, as the agent itself runs them; only what talks to a control plane is
missing.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from edge_tests.harness.box import LocalBox
from edge_tests.harness.serving import eventually

SOAK_S = 0.05
MOST_S = 120.0


def swap(box: LocalBox, prepared: Any) -> dict[str, float]:
    model = prepared.manifest.model
    serving = box.router.serving(model)
    old = serving.active if serving is not None else None
    began = time.monotonic()
    if not box.activate(prepared):
        raise RuntimeError("it is in shadow")
    turned = time.monotonic()
    eventually(lambda: not box.state.slots(model).soaking, "the soak ended", MOST_S)
    if old is not None:
        eventually(lambda: old.resident_bytes() == 0, "the old worker ended", MOST_S)
    return {"began": began, "turned": turned, "ended": time.monotonic()}


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    wanted = json.loads(sys.argv[2])
    golden = {number: Path(path) for number, path in wanted["golden"].items()}
    with LocalBox(Path(sys.argv[1]), soak_s=SOAK_S, load_deadline_s=MOST_S) as box:
        prepared = {
            (model, int(number)): box.install(int(number), Path(path), model=model, golden=golden[number])
            for model in wanted["models"]
            for number, path in wanted["versions"].items()
        }
        for model in wanted["models"]:
            swap(box, prepared[model, 1])
        print(json.dumps({"address": box.address}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            if command["op"] == "swap":
                answer: dict[str, Any] = dict(swap(box, prepared[command["model"], command["version"]]))
            else:
                answer = {"workers": {item.model: item.active.pid for item in box.router.models()}}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
