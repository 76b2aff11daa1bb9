"""A Debian 12 system in a directory: systemd, Python, and a venv with all that sluice needs, without sluice.

It is made once by `mmdebstrap` and kept below .cache/, under a name that changes with what it is made of.
Tests install the checkout into it. `/wheels` holds what pip needs for that, because a container has no
network; `/etc/pip.conf` points there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "debian"
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = ("libstdc++6", "python3-venv", "sudo", "systemd-sysv")
EXTRAS = ("agent", "onnx", "tflite", "control")
BUILD_S = 200.0  # for each step; most of it is downloads
# In namespaces that end, with all their processes and mounts, when whoever started the command ends.
CONFINED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private"),
)
_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "ip": "iproute2",
}
_NOT_UNPACKED = ("doc", "locale", "man")
_ETC = {
    "hostname": "box\n",
    "hosts": "127.0.0.1 localhost box\n",
    "pip.conf": "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n",
}


class UnavailableError(Exception):
    """Not possible on this machine; the text says what is missing."""


def tree() -> Path:
    """The directory; nobody may write there. Raises UnavailableError."""
    _check_machine()
    requirements, constraints = _requirements(), (ROOT / "constraints.txt").read_text("utf-8")
    recipe = repr((SUITE, PACKAGES, requirements, constraints, _ETC, platform.machine()))
    place = CACHE / f"{SUITE}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            for old in CACHE.glob(f"{SUITE}-*"):
                shutil.rmtree(old)
            made = CACHE / f"{SUITE}-unfinished"
            _make(made, requirements)
            made.rename(place)
    return place


def nspawn(directory: Path) -> list[str]:
    """`systemd-nspawn` on the directory, without network."""
    options = ["--register=no", "--keep-unit", "--private-network"]
    return ["systemd-nspawn", "-q", "-D", str(directory), *options]


def _check_machine() -> None:
    missing = sorted({package for program, package in _PROGRAMS.items() if not shutil.which(program)})
    if missing:
        raise UnavailableError(f"Debian package missing: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise UnavailableError("needs root, to boot a container")


def _requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    optional = project["project"]["optional-dependencies"]
    extras = [requirement for extra in EXTRAS for requirement in optional[extra]]
    return [*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]]


def _make(directory: Path, requirements: list[str]) -> None:
    unpack = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _NOT_UNPACKED]
    _run(
        *(*CONFINED, "mmdebstrap", "--mode=root", "--variant=essential", f"--include={','.join(PACKAGES)}"),
        *("--dpkgopt=force-unsafe-io", '--aptopt=Acquire::Languages "none"', *unpack, SUITE, str(directory)),
    )
    _run(*CONFINED, *nspawn(directory), "--pipe", "/bin/true")
    platforms = [f"manylinux_2_{minor}_{platform.machine()}" for minor in (36, 34, 31, 28, 27, 24, 17)]
    platforms += [f"{name}_{platform.machine()}" for name in ("manylinux2014", "manylinux1")]
    _run(
        *(sys.executable, "-m", "pip", "download", "-q", "-d", str(directory / "wheels")),
        *("--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"),
        *(option for name in platforms for option in ("--platform", name)),
        *("-c", str(ROOT / "constraints.txt"), *requirements),
    )
    for name, text in _ETC.items():
        (directory / "etc" / name).write_text(text, "utf-8")
    shutil.copy(ROOT / "constraints.txt", directory / "wheels" / "constraints.txt")
    install = '/opt/sluice/bin/pip install -q -c /wheels/constraints.txt "$@"'
    _run(
        *(*CONFINED, *nspawn(directory), "--pipe", "/bin/sh", "-ec"),
        *(f"python3 -m venv /opt/sluice && {install}", "sh", *requirements),
    )


def _run(*command: str) -> None:
    program = next(word for word in command if word in ("mmdebstrap", "systemd-nspawn", "pip"))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            timeout=BUILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise UnavailableError(f"{program} did not end within {BUILD_S:g} s") from expired
    if done.returncode:
        words = " | ".join(done.stdout.strip().splitlines()[-5:])
        raise UnavailableError(f"{program} failed here with {done.returncode}: {words}")
