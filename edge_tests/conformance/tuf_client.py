#!/usr/bin/env python3
"""The device's TUF client as an executable, for theupdateframework's tuf-conformance suite.

    tuf_client.py --metadata-dir DIR init ROOT
    tuf_client.py --metadata-dir DIR --metadata-url URL refresh
    tuf_client.py --metadata-dir DIR --metadata-url URL --target-name PATH … --target-base-url URL \\
      --target-dir DIR download

The suite's CLIENT-CLI.md is the contract. What verifies is `updater.trust.client.TrustClient`, as on a box;
only the fetching is HTTP here instead of gRPC. Exit code 0 for success, 1 for any refusal. `make
conformance-tuf` runs the suite.
"""

from __future__ import annotations

import argparse
import io
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

if __name__ == "__main__":  # run as a file, from anywhere
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "proto")]

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile

from sluice.api.v1 import errors_pb2
from updater.atomic import write_atomic
from updater.errors import SluiceError
from updater.trust.client import TrustClient

TIMEOUT_S = 10.0
PIECE_BYTES = 1 << 16
ABSENT = (403, 404)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def pieces(url: str) -> Iterator[bytes] | None:
    """What lies at a URL, or None where nothing does. Raises SluiceError(CONTROL_UNREACHABLE)."""
    try:
        response = _OPENER.open(url, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in ABSENT:
                return None
        raise SluiceError(errors_pb2.CONTROL_UNREACHABLE, f"{url}: {error}") from error
    except OSError as error:
        raise SluiceError(errors_pb2.CONTROL_UNREACHABLE, f"{url}: {error}") from error

    def read() -> Iterator[bytes]:
        with response:
            while piece := response.read(PIECE_BYTES):
                yield piece

    return read()


def client(options: argparse.Namespace) -> TrustClient:
    base = options.metadata_url.rstrip("/")

    def fetch(role: str, version: int | None) -> Iterator[bytes] | None:
        number = "" if version is None else f"{version}."
        return pieces(f"{base}/{number}{quote(role, '')}.json")

    return TrustClient(options.metadata_dir, None, fetch)


def download(options: argparse.Namespace) -> None:
    trust = client(options)
    trust.refresh()
    for path in options.target_name:
        target = trust.target(path)
        if target is None:
            raise SluiceError(errors_pb2.VERSION_NOT_SIGNED, f"no signed metadata names {path}")
        place = options.target_dir / quote(path, "")
        if not (place.is_file() and matches(target, place.read_bytes())):
            data = artifact(target, options.target_base_url, prefixed=bool(trust.root.consistent_snapshot))
            write_atomic(place, data)


def matches(target: TargetFile, data: bytes) -> bool:
    try:
        target.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def artifact(target: TargetFile, base: str, *, prefixed: bool) -> bytes:
    """The bytes that a target names, and no more than that of them."""
    directory, slash, name = target.path.rpartition("/")
    if prefixed:
        name = f"{next(iter(target.hashes.values()))}.{name}"
    url = f"{base.rstrip('/')}/{directory}{slash}{name}"
    found = pieces(url)
    gathered = io.BytesIO()
    for piece in found or ():
        gathered.write(piece)
        if gathered.tell() > target.length:
            break
    data = gathered.getvalue()
    if found is None or not matches(target, data):
        raise SluiceError(errors_pb2.FILE_DIGEST_MISMATCH, f"{url} is not what the signed metadata names")
    return data


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("init").add_argument("root", type=Path)
    verbs.add_parser("refresh")
    verbs.add_parser("download")
    options = parser.parse_args()
    try:
        if options.verb == "init":
            write_atomic(options.metadata_dir / "root.json", options.root.read_bytes())
        elif options.verb == "refresh":
            client(options).refresh()
        else:
            download(options)
    except SluiceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
