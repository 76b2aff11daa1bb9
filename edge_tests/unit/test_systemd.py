"""The units as systemd itself reads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
# Exposure as `systemd-analyze security` scores it, times ten: 100 is an unprotected service.
MAX_EXPOSURE = {"sluice-agent.service": 20, "sluice-control.service": 15}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="Debian package missing: systemd (systemd-analyze)"
)


def installed(unit: Path, directory: Path) -> Path:
    """A copy of the unit whose program exists: verify refuses an ExecStart that is not there."""
    lines = []
    for line in unit.read_text("utf-8").splitlines():
        if line.startswith("ExecStart="):
            program = line.removeprefix("ExecStart=").split()[0]
            assert program.startswith("/opt/sluice/bin/sluice"), line
            line = line.replace(program, sys.executable)
        lines.append(line)
    copy = directory / unit.name
    copy.write_text("\n".join(lines) + "\n", "utf-8")
    return copy


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_unit_verifies_without_a_word(unit: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(installed(unit, tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # verify returns 0 on unknown keys: what it prints is the verdict.
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_unit_is_hardened(unit: Path, tmp_path: Path) -> None:
    threshold = MAX_EXPOSURE[unit.name]
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            f"--threshold={threshold}",
            str(installed(unit, tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_units_notify_restart_and_watch() -> None:
    assert [unit.name for unit in SERVICES] == ["sluice-agent.service", "sluice-control.service"]
    for unit in SERVICES:
        text = unit.read_text("utf-8")
        for line in (
            *("Type=notify", "WatchdogSec=60s", "StartLimitIntervalSec=0"),
            *("NoNewPrivileges=yes", "ProtectSystem=strict"),
        ):
            assert f"\n{line}\n" in text, f"{unit.name} lacks {line}"
        assert "\nRestart=" in text
