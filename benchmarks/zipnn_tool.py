"""ZipNN's delta mode as a program: `python zipnn_tool.py encode|decode DTYPE OLD NEW|PATCH OUT`.

Runs in the venv of constraints-minilm.txt, because ZipNN needs PyTorch, and prints the seconds that the work
took without the start of PyTorch. ZipNN XORs only byte strings of one length, so the base is cut or padded
with zeros to the target's; the patch begins with that length.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from zipnn import ZipNN  # noqa: E402 - it warns while it is imported

LENGTH_BYTES = 8


def fitted(base: bytes, length: int) -> bytes:
    return base[:length].ljust(length, b"\0")


def main() -> None:
    action, dtype, old, given, out = sys.argv[1:]
    start = time.perf_counter()
    base, data = Path(old).read_bytes(), Path(given).read_bytes()
    coder = ZipNN(input_format="byte", bytearray_dtype=dtype, delta_compressed_type="byte")
    if action == "encode":
        patch = coder.compress(data, delta_second_data=fitted(base, len(data)))
        Path(out).write_bytes(len(data).to_bytes(LENGTH_BYTES, "little") + patch)
    else:
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        Path(out).write_bytes(coder.decompress(data[LENGTH_BYTES:], delta_second_data=fitted(base, length)))
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
