"""Runs `sluice` for tests: in this process, or as the command that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from fleet.cli.app import cli

SLUICE = Path(sys.executable).with_name("sluice")


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    def expect(self, code: int = 0) -> Ran:
        assert self.code == code, f"exit {self.code}, not {code}\n{self.out}\n{self.err}"
        return self


def sluice(*arguments: object) -> Ran:
    """Runs in this process; nothing may get out but an exit code."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def spawn(*arguments: object, **keywords: Any) -> subprocess.Popen[str]:
    """Starts the installed command; Ctrl-C reaches it also where the shell above ignores it (nohup)."""
    environment = {**os.environ, **keywords.pop("env", {})}
    keywords.setdefault("stdout", subprocess.PIPE)
    keywords.setdefault("stderr", subprocess.PIPE)
    command = ["env", "--default-signal=INT", str(SLUICE), *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, text=True, env=environment, **keywords)


def run(*arguments: object, **keywords: Any) -> Ran:
    """Runs the installed command to its end."""
    with spawn(*arguments, **keywords) as process:
        out, err = process.communicate(timeout=60)
    return Ran(process.returncode, out, err)
