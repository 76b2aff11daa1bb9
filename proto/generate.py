"""Generates the Python stubs from the .proto files: `make proto`, or `python proto/generate.py [--check]`.

Runs protoc (from grpcio-tools) with mypy-protobuf over every .proto below this directory and writes
`*_pb2.py`, `*_pb2.pyi`, `*_pb2_grpc.py` and `*_pb2_grpc.pyi` beside it. With --check nothing is written: the
command exits 1 and names each stub that differs from what its source would give. grpcio-tools stays on a
release of the protobuf 6 generation, because tritonclient does not accept protobuf 7 (docs/adr/0002).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
STUB_ENDINGS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def sources() -> list[str]:
    """Paths of all .proto files, relative to this directory."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))


def generate(out: Path) -> None:
    """Writes all stubs below `out`; raises RuntimeError when protoc refuses a file."""
    bundled = Path(grpc_tools.__file__).parent / "_proto"
    plugins = Path(sys.executable).parent  # the venv's, whether or not it is activated
    status = protoc.main(
        [
            "protoc",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--proto_path={ROOT}",
            f"--proto_path={bundled}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=readable_stubs,quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources(),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}; its message stands above")


def stubs(directory: Path) -> dict[str, bytes]:
    """Every stub below `directory` by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.name.endswith(STUB_ENDINGS)
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        wanted, present = stubs(Path(scratch)), stubs(ROOT)
    stale = sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))
    if check:
        for name in stale:
            print(f"proto/{name} does not match its source: run `make proto` and commit the result")
        return 1 if stale else 0
    for name in stale:
        path = ROOT / name
        if name in wanted:
            path.write_bytes(wanted[name])
        else:
            path.unlink()
    print(f"{len(wanted)} stubs, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
