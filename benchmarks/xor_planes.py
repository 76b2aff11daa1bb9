"""A peer of ours to compare with: XOR of aligned tensors, byte planes, zstd -9.

What a careful engineer would write in an afternoon, and what BitX-like tools do. Tensors of both files that
agree in name, dtype and shape are XORed; byte k of every element goes to plane k, each plane is packed with
zstd -9. Everything else of the target goes through `zstd -9 --patch-from` the whole base, by zstd's program:
the library's dictionaries find far less. Of a file without aligned tensors that is all of it.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from benchmarks.peers import Peer, run_tool, spans
from updater.formats.span import ELEMENT_BITS, TensorSpan

LEVEL = 9
PACK = f"zstd -q -f -{LEVEL} --long=31 --patch-from={{old}} {{rest}} -o {{packed}}"
UNPACK = "zstd -q -f -d --long=31 --memory=2048MB --patch-from={old} {packed} -o {rest}"

Bytes = NDArray[np.uint8]
Aligned = tuple[int, int, int, int]  # offset in the base, offset in the target, bytes, bytes of an element


def aligned_tensors(old: Sequence[TensorSpan], new: Sequence[TensorSpan]) -> list[Aligned]:
    """Tensors of the target whose name, dtype and shape the base has too, in the target's order."""
    bases = {(span.name, span.dtype, span.shape): span for span in old if span.name}
    found = []
    for span in new:
        base = bases.get((span.name, span.dtype, span.shape))
        if base is not None and base.length == span.length > 0:
            found.append((base.offset, span.offset, span.length, max(1, ELEMENT_BITS[span.dtype] // 8)))
    return found


def outside(total: int, tensors: Sequence[Aligned]) -> list[tuple[int, int]]:
    """The runs (start, end) of the target between the aligned tensors."""
    runs, position = [], 0
    for _, offset, length, _ in tensors:
        runs.append((position, offset))
        position = offset + length
    return [*runs, (position, total)]


class XorPlanes(Peer):
    """XOR + byte planes + zstd -9."""

    name = "XOR+planes"

    def missing(self) -> str:
        return "" if shutil.which("zstd") else "zstd not found: apt-get install zstd"

    def encode(self, old: Path, new: Path, patch: Path) -> None:
        base, target = np.fromfile(old, np.uint8), np.fromfile(new, np.uint8)
        tensors = aligned_tensors(spans(old), spans(new))
        planes: dict[tuple[int, int], list[Bytes]] = defaultdict(list)
        for base_at, target_at, length, width in tensors:
            xored = base[base_at : base_at + length] ^ target[target_at : target_at + length]
            for plane in range(width):
                planes[width, plane].append(xored[plane::width])
        packer = zstandard.ZstdCompressor(level=LEVEL)
        frames = [packer.compress(np.concatenate(parts).tobytes()) for _, parts in sorted(planes.items())]
        rest, packed = patch.with_name("xor.rest"), patch.with_name("xor.packed")
        rest.write_bytes(
            b"".join(target[start:end].tobytes() for start, end in outside(len(target), tensors))
        )
        if rest.stat().st_size:  # zstd 1.5.4 aborts when it gets nothing to pack
            run_tool(PACK.format(old=old, rest=rest, packed=packed).split())
            frames.append(packed.read_bytes())
        else:
            frames.append(b"")
        head = packer.compress(json.dumps([len(target), tensors, list(map(len, frames))]).encode())
        patch.write_bytes(len(head).to_bytes(4, "little") + head + b"".join(frames))

    def decode(self, old: Path, patch: Path, out: Path) -> None:
        base, data = np.fromfile(old, np.uint8), patch.read_bytes()
        unpacker = zstandard.ZstdDecompressor()
        position = 4 + int.from_bytes(data[:4], "little")
        size, tensors, lengths = json.loads(unpacker.decompress(data[4:position]))
        frames = []
        for length in lengths:
            frames.append(data[position : position + length])
            position += length
        unpacked, packed = out.with_name("xor.rest"), out.with_name("xor.packed")
        packed.write_bytes(frames.pop())
        unpacked.write_bytes(b"")
        if packed.stat().st_size:
            run_tool(UNPACK.format(old=old, rest=unpacked, packed=packed).split())
        rest = np.fromfile(unpacked, np.uint8)
        keys = sorted({(tensor[3], plane) for tensor in tensors for plane in range(tensor[3])})
        planes = {
            key: np.frombuffer(unpacker.decompress(frame), np.uint8)
            for key, frame in zip(keys, frames, strict=True)
        }
        target, used, taken = np.empty(size, np.uint8), defaultdict(int), 0
        for start, end in outside(size, tensors):
            target[start:end] = rest[taken : taken + end - start]
            taken += end - start
        for base_at, target_at, length, width in tensors:
            count = length // width
            for plane in range(width):
                part = planes[width, plane][used[width] : used[width] + count]
                target[target_at + plane : target_at + length : width] = part
            used[width] += count
            target[target_at : target_at + length] ^= base[base_at : base_at + length]
        out.write_bytes(target.tobytes())
