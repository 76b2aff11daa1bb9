"""The shipped units under a real systemd, installed by the operator guide's own commands.

One container is booted for all tests of this file: the guide's blocks install both services, models are
shipped, then things go wrong. What a test breaks, it mends.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.limits import OOM_SCORE_ADJUST
from edge_tests.harness.debian_tree import ROOT, UnavailableError, tree
from edge_tests.harness.models import OUTPUT, golden, samples, tiny_onnx, tiny_tflite
from edge_tests.harness.nspawn import Container
from runtimes import registry

# The first test may have to make the tree.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

GUIDE = ROOT / "docs" / "operator-guide.md"
CONTROL_ADDRESS, INFERENCE_ADDRESS = "10.0.0.1", "127.0.0.1:8500"
UNITS = ("sluice-control", "sluice-agent")
CHECKOUT = ("agent", "docs", "fleet", "proto", "runtimes", "systemd", "updater")
CHECKOUT_FILES = ("LICENSE", "README.md", "constraints.txt", "pyproject.toml")
NEEDS_NETWORK = ("sudo apt-get install ", "git clone ")  # done beforehand: the container has none
DYNAMIC_USERS = range(61184, 65520)  # as systemd.exec(5) has it
HIDDEN = 512
WATCHDOG_S = 5
PASSPHRASE_FILE = "/root/passphrase"
SIGN = f"export SLUICE_PASSPHRASE_FILE={PASSPHRASE_FILE}"
SHIP = f"{SIGN}; export SLUICE_CONTROL=10.0.0.1:8470; cd /root/models"


def guide(section: str) -> str:
    """The commands under a heading of the operator guide."""
    text = GUIDE.read_text("utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    block = re.search(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block is not None, section
    return "".join(line for line in block[1].splitlines(keepends=True) if not line.startswith(NEEDS_NETWORK))


class Box:
    """The container with both services, as the tests speak of it."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.complaints = ""
        self.run = container.run
        self.wait = container.wait

    @property
    def models(self) -> Path:
        return self.container.root / "root" / "models"

    def show(self, unit: str, *properties: str) -> list[str]:
        """Values of a unit's properties, in the order asked."""
        lines = self.run(f"systemctl show {unit} -p {','.join(properties)}").stdout.splitlines()
        values = dict(line.split("=", 1) for line in lines)
        return [values[name] for name in properties]

    def main_process(self, unit: str) -> int:
        return int(self.show(unit, "MainPID")[0])

    def status(self) -> dict[str, Any]:
        """What `sluice-agent status` says; empty while no agent answers."""
        done = self.run("sudo -u sluice sluice-agent status --json", check=False)
        status: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return status

    def model(self, name: str) -> dict[str, Any]:
        models = self.status().get("reported", [])
        return next((model for model in models if model["model"] == name), {})

    def answers(self, name: str, version: int, file: Path) -> None:
        """The model predicts what its file predicts here."""
        inputs = samples(4)
        with registry.load(file) as model:
            expected = model.run(inputs)[OUTPUT]
        sent = {key: {"datatype": "FP32", "data": array.tolist()} for key, array in inputs.items()}
        answer = self.wait_for_answer(name, sent)
        assert answer["version"] == str(version), answer
        np.testing.assert_allclose(answer["outputs"][OUTPUT], expected, rtol=1e-4, atol=1e-5)

    def wait_for_answer(self, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            answer = self.container.infer(INFERENCE_ADDRESS, name, inputs)
            return answer if answer["ok"] else {}

        return self.wait(ask, f"{name} answers")

    def both_answer(self) -> None:
        self.answers("detector", 2, self.models / "tuned.onnx")
        self.answers("lite", 1, self.models / "lite.tflite")

    def workers(self) -> set[int]:
        return {int(worker["process_id"]) for worker in self.status()["workers"]}


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted Debian with the checkout and some models, and nothing of sluice running."""
    directory = tmp_path_factory.mktemp("nspawn")
    try:
        debian = tree()
    except UnavailableError as missing:
        pytest.skip(str(missing))
    with Container(debian, directory) as place:
        try:
            place.boot()
        except AssertionError as failed:
            pytest.skip(f"systemd does not boot in a container here: {failed}")
        checkout, models = place.root / "root" / "sluice", place.root / "root" / "models"
        checkout.mkdir()
        for name in CHECKOUT:
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in CHECKOUT_FILES:
            shutil.copy(ROOT / name, checkout / name)
        models.mkdir()
        detector = tiny_onnx(models / "detector.onnx", hidden=HIDDEN)
        golden(models / "golden.npz", detector, samples(8))
        tiny_onnx(models / "tuned.onnx", hidden=HIDDEN, change=0.0005)
        tiny_tflite(models / "lite.tflite", hidden=HIDDEN)
        place.add_address(f"{CONTROL_ADDRESS}/32")
        yield place


@pytest.fixture(scope="module")
def box(container: Container) -> Box:
    """Both services installed and one ONNX model (version 2) and one TFLite model served."""
    box = Box(container)
    init = "sluice control init "
    steps = guide("The control machine").replace(init, f"{init}--passphrase-file {PASSPHRASE_FILE} ")
    assert PASSPHRASE_FILE in steps  # there is no terminal to ask at
    box.run(f"(umask 077; echo correct horse > {PASSPHRASE_FILE})\ncd /root/sluice\n{steps}")
    slip = json.loads(box.run("sluice device token pi-kitchen --json").stdout)["token"]
    steps = guide("A box").replace("TOKEN=slt_...", f"TOKEN={slip}")
    assert slip in steps
    done = box.run(f"cd /root/sluice\ncp /var/lib/sluice-control/ca/bundle.pem .\n{steps}")
    assert done.stdout.endswith("no faults\n"), done.stdout
    assert "pi-kitchen" in box.run("sluice device list").stdout
    # systemd's own, e.g. about keys that it ignores; those about directories come in the unit's name.
    journal = "journalctl -b -q --no-pager -o cat"
    box.complaints = box.run(
        f"{journal} -p warning _PID=1; {journal} -u 'sluice-*' | grep 'already exists' || true"
    ).stdout
    config = container.root / "etc" / "sluice" / "agent.toml"
    by_name = config.read_text("utf-8").replace(CONTROL_ADDRESS, "control.example")
    config.write_text(by_name + "\n[update]\nsoak_s = 1\n")
    box.run(f"echo {CONTROL_ADDRESS} control.example >> /etc/hosts; systemctl restart sluice-agent")
    box.run(f"cd /root/models\n{SIGN}\n{guide('Shipping a version')}")
    box.answers("detector", 1, box.models / "detector.onnx")
    full = int(box.model("detector")["fetch_total_bytes"])
    box.run(f"{SHIP}; sluice model push tuned.onnx --name detector; sluice rollout start detector --watch")
    box.run(f"{SHIP}; sluice model push lite.tflite --name lite; sluice rollout start lite --watch")
    # The control plane's builder made a delta under its unit's restrictions, and the agent applied it.
    assert 0 < int(box.model("detector")["fetch_total_bytes"]) < full
    return box


def test_units_as_shipped_are_started_and_ready(box: Box) -> None:
    for unit in UNITS:
        shipped = (ROOT / "systemd" / f"{unit}.service").read_text("utf-8")
        assert (box.container.root / f"etc/systemd/system/{unit}.service").read_text("utf-8") == shipped
        state = box.show(unit, "Type", "ActiveState", "SubState", "NRestarts", "DropInPaths")
        assert state == ["notify", "active", "running", "0", ""], box.container.journal()
        page = box.show(unit, "Documentation")[0].removeprefix("file:")
        assert (box.container.root / page.lstrip("/")).read_bytes() == GUIDE.read_bytes()
    serving = ["serving detector@2, lite@1; connected"]
    box.wait(lambda: box.show("sluice-agent", "StatusText") == serving, "the status line is up to date")
    failed = box.run("systemctl --failed --no-legend --plain").stdout
    assert failed == ""
    assert box.complaints == ""


def test_files_belong_to_whom_the_guide_says(box: Box) -> None:
    def modes(*paths: str) -> list[str]:
        return box.run(f"stat -c '%a %U:%G' {' '.join(paths)}").stdout.splitlines()

    paths = ("/var/lib/sluice", "/etc/sluice", "/run/sluice", "/run/sluice/agent.sock")
    assert modes(*paths) == ["750 sluice:sluice", "750 root:sluice", "755 sluice:sluice", "660 sluice:sluice"]
    assert box.run("id -nG sluice").stdout.split() == ["sluice", "video", "render"]
    # Only what docs/agent-config.md lists; no library keeps anything of its own.
    names = set(box.run("ls -A /var/lib/sluice").stdout.split())
    assert {re.sub(r"-(wal|shm)$", "", name) for name in names} == {
        *(
            "identity",
            "inference-address",
            "lock",
            "outbox.db",
            "slots",
            "sockets",
            "state.db",
            "store",
            "trust",
        )
    }
    held = [f"/var/lib/sluice/identity/{name}" for name in ("", "enrolment.key", "credentials.json")]
    assert modes(*held) == ["700 sluice:sluice", *["600 sluice:sluice"] * 2]
    assert box.run("readlink /var/lib/sluice-control").stdout == "private/sluice-control\n"
    assert modes("/var/lib/private") == ["700 root:root"]
    mode, owner = box.run("stat -c '%a %u' /var/lib/private/sluice-control").stdout.split()
    process = box.main_process("sluice-control")
    assert (mode, owner) == ("750", box.run(f"stat -c %u /proc/{process}").stdout.strip())
    assert int(owner) in DYNAMIC_USERS


def test_models_are_loaded_and_predict_in_restricted_workers(box: Box) -> None:
    box.both_answer()
    runtimes = {worker["model"]: worker["runtime"] for worker in box.status()["workers"]}
    assert runtimes == {"detector": "onnxruntime", "lite": "litert"}
    agent = box.main_process("sluice-agent")
    for process in (agent, *box.workers()):
        fields = dict(
            re.findall(
                r"^(CapEff|NoNewPrivs|Seccomp):\s*(\w+)$", box.run(f"cat /proc/{process}/status").stdout, re.M
            )
        )
        assert fields == {"CapEff": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    for worker in box.workers():
        assert int(box.run(f"cat /proc/{worker}/oom_score_adj").stdout) == OOM_SCORE_ADJUST


@pytest.mark.parametrize("unit", UNITS)
def test_a_hung_service_is_killed_and_restarted(box: Box, unit: str) -> None:
    drop_in = box.container.root / f"etc/systemd/system/{unit}.service.d/watchdog.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}s\n")
    box.run(f"systemctl daemon-reload; systemctl restart {unit}")
    hung = box.main_process(unit)
    box.run(f"kill -STOP {hung}")
    _restarted(box, unit, hung)
    assert f"Watchdog timeout (limit {WATCHDOG_S}s)!" in box.container.journal(unit)
    box.both_answer()
    drop_in.unlink()
    drop_in.parent.rmdir()
    box.run(f"systemctl daemon-reload; systemctl restart {unit}")


@pytest.mark.parametrize("unit", UNITS)
def test_a_killed_service_is_restarted(box: Box, unit: str) -> None:
    box.wait(lambda: len(box.status().get("workers", [])) == 2, "both models have a worker")
    killed, workers = box.main_process(unit), box.workers()
    box.run(f"kill -KILL {killed}")
    _restarted(box, unit, killed)
    box.both_answer()
    survivors = box.workers() & workers
    assert survivors == (set() if unit == "sluice-agent" else workers)
    assert len(box.container.processes("agent.worker_process")) == 2
    box.wait(lambda: box.status().get("control_connected"), "the agent found the control plane again")


def _restarted(box: Box, unit: str, before: int) -> None:
    def running() -> bool:
        state, process = box.show(unit, "ActiveState", "MainPID")
        return state == "active" and process not in ("0", str(before))

    box.wait(running, f"{unit} was restarted")
    assert int(box.show(unit, "NRestarts")[0]) >= 1


def test_a_restored_backup_is_handed_to_the_dynamic_user(box: Box) -> None:
    place = "/var/lib/private/sluice-control"
    box.run(f"systemctl stop sluice-control; chown -R root: {place}; systemctl start sluice-control")
    assert box.run(f"find {place} -user root").stdout == ""
    listed = json.loads(box.run(f"{SHIP}; sluice --json model list").stdout)
    assert {model["name"]: model["latest_version"] for model in listed["models"]} == {
        "detector": 2,
        "lite": 1,
    }


@pytest.mark.parametrize("unit", UNITS)
def test_stopping_leaves_no_process(box: Box, unit: str) -> None:
    mine = "/opt/sluice/bin/sluice-agent" if unit == "sluice-agent" else "/opt/sluice/bin/sluice control"
    assert box.container.processes(mine)
    box.run(f"systemctl stop {unit}")
    assert box.show(unit, "ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    if unit == "sluice-agent":
        assert box.container.processes("agent.worker_process") == {}
    else:
        assert box.container.processes("fleet.builder") == {}
        box.both_answer()  # a box does not need the control plane
    assert box.container.processes(mine) == {}
    box.run(f"systemctl start {unit}")


def test_a_rebooted_box_serves_without_the_control_plane(box: Box) -> None:
    box.container.power_off()
    box.container.boot()
    # The control plane's address is gone with the reboot, so it cannot start; nobody waits for it.
    box.both_answer()
    assert box.show("sluice-agent", "ActiveState") == ["active"]
    assert not box.status().get("control_connected")
    box.wait(lambda: int(box.show("sluice-control", "NRestarts")[0]) >= 2, "the control plane keeps trying")
    box.container.add_address(f"{CONTROL_ADDRESS}/32")
    box.wait(
        lambda: box.show("sluice-control", "ActiveState") == ["active"], "its address is there, it starts"
    )
