"""Passphrases of key files: from a file or the environment for scripts, else asked at the terminal.

--passphrase-file FILE, then SLUICE_PASSPHRASE_FILE, then SLUICE_PASSPHRASE, then the question. One passphrase
given that way opens every key of a run; asked ones are asked once for each key. The first line of a file
counts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError, os_errors
from updater.trust.keys import check_passphrase

VARIABLE = "SLUICE_PASSPHRASE"
FILE_VARIABLE = "SLUICE_PASSPHRASE_FILE"


class Passphrases:
    """Opens the keys of one run; call it with a key's name.

    Args:
        file: of --passphrase-file; None for the environment, else the terminal.
    """

    def __init__(self, file: Path | None) -> None:
        named = os.environ.get(FILE_VARIABLE)
        self._file = file or (Path(named) if named else None)
        self._asked: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """The passphrase of a key. Raises SluiceError(KEY_UNAVAILABLE | IO_FAILED)."""
        given = self._given()
        if given is None and name not in self._asked:
            self._asked[name] = self._ask(f"passphrase of the key {name}", name, confirm=False)
        return given if given is not None else self._asked[name]

    def new(self, name: str) -> str:
        """The passphrase of a key that is being made; asked twice.

        Raises SluiceError(KEY_UNAVAILABLE), also where it is too short; IO_FAILED.
        """
        given = self._given()
        if given is None and name not in self._asked:
            self._asked[name] = self._ask(f"new passphrase of the key {name}", name, confirm=True)
        passphrase = given if given is not None else self._asked[name]
        check_passphrase(passphrase, name)
        return passphrase

    def _given(self) -> str | None:
        if self._file is not None:
            with os_errors("reading the passphrase", self._file):
                return self._file.read_text("utf-8").partition("\n")[0]
        return os.environ.get(VARIABLE)

    def _ask(self, what: str, name: str, *, confirm: bool) -> str:
        if not sys.stdin.isatty():
            raise SluiceError(
                errors_pb2.KEY_UNAVAILABLE,
                f"the {what} is needed, and there is no terminal to ask at",
                hint=f"give it with --passphrase-file, {FILE_VARIABLE} or {VARIABLE}",
                obj=name,
            )
        answer: str = click.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True)
        return answer
