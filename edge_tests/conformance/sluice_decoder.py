"""sluice's own decoder as an executable of the conformance contract: BASE_OR_DASH DELTA OUT."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_tests.conformance.delta import ANNOUNCED_DIGEST, ANNOUNCED_SIZE
from updater import delta
from updater.digests import PREFIX
from updater.errors import SluiceError


def main() -> int:
    """Applies one delta; 0, or 1 with the error's code on stderr."""
    base, source, out = sys.argv[1:]
    digest, size = os.environ.get(ANNOUNCED_DIGEST), os.environ.get(ANNOUNCED_SIZE)
    try:
        applier = delta.Applier(
            None if base == "-" else Path(base),
            Path(out),
            expected_target=PREFIX + digest if digest else None,
            expected_size=int(size) if size else None,
        )
        with applier:
            try:
                applier.feed(Path(source).read_bytes())
                applier.finish()
            except SluiceError:
                applier.discard()
                raise
    except SluiceError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
