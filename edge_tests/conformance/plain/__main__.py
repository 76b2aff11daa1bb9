"""`python -m edge_tests.conformance.plain BASE_OR_DASH DELTA OUT`: applies a delta; "-" stands for no base.

Ends with 0, or with 1 and the error code at the begin of the last line of standard error. The environment may
announce a target: ANNOUNCED_SHA256 (hexadecimal) and ANNOUNCED_SIZE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_tests.conformance.plain.delta import decode
from edge_tests.conformance.plain.fault import Fault


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("usage: python -m edge_tests.conformance.plain BASE_OR_DASH DELTA OUT", file=sys.stderr)
        return 2
    base = None if arguments[0] == "-" else Path(arguments[0]).read_bytes()
    announced = None
    if "ANNOUNCED_SHA256" in os.environ:
        digest = bytes.fromhex(os.environ["ANNOUNCED_SHA256"])
        announced = digest, int(os.environ["ANNOUNCED_SIZE"])
    try:
        target = decode(base, Path(arguments[1]).read_bytes(), announced)
    except Fault as fault:
        print(f"{fault.code}: {fault}", file=sys.stderr)
        return 1
    Path(arguments[2]).write_bytes(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
