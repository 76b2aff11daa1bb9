"""Entry of `sluice`. Says plainly what is missing when only the base package is installed."""

from __future__ import annotations

import os
import sys

_NEEDED = ("click", "cryptography", "rich", "securesystemslib", "tuf", "yaml")
_EXIT_FAILED = 1


def main() -> None:
    """Runs the command line with sys.argv and exits."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the package installs on 3.10, for boxes
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"sluice: this command needs Python 3.11 or newer, and runs on {found}", file=sys.stderr)  # noqa: T201
        sys.exit(_EXIT_FAILED)
    # gRPC reads this once, at import; what it would print reaches people as the error of a call.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from fleet.cli.app import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        why = f"the package {package} is missing"
        print(f"sluice: {why}; install it with: pip install 'sluice[control]'", file=sys.stderr)  # noqa: T201
        sys.exit(_EXIT_FAILED)
    cli(prog_name="sluice")


if __name__ == "__main__":
    main()
