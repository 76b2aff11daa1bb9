"""Valid vectors of the container, the coders, and the instructions copy and literal."""

from __future__ import annotations

from collections.abc import Iterator

from edge_tests.conformance.vectors import build, samples
from edge_tests.conformance.vectors.build import (
    Block,
    Header,
    Made,
    copy,
    delta,
    literal,
    one_block,
    payload,
    raw,
)
from edge_tests.conformance.vectors.samples import BASE, TARGET
from updater import limits

_ALL = ("lzma", "patch", "program", "requantise", "tensor")


def container() -> Iterator[Made]:
    """Files around their blocks."""
    yield Made("full-empty", "An empty target without a base.", None, delta(Header(None, b"", 0), []), b"")
    yield Made("empty-target", "An empty target from a base.", BASE, delta(Header(BASE, b"", 0), []), b"")
    yield Made(
        "minimal",
        "One literal byte without a base.",
        None,
        one_block(None, b"x", payload(literal(1, 1), raw(b"x"))),
        b"x",
    )
    text = b"a full copy " * 30
    yield Made(
        "full-copy",
        "A full copy as a zstd frame.",
        None,
        one_block(None, text, payload(literal(1, len(text)), build.zstd(text))),
        text,
    )
    yield Made(
        "empty-base",
        "A base of no bytes, which is a base all the same.",
        b"",
        one_block(b"", b"new", payload(literal(1, 3), raw(b"new"))),
        b"new",
    )
    header, blocks = samples.sample_header(), samples.sample_blocks()
    yield Made(
        "two-blocks", "Two blocks with copies, a literal and a tensor.", BASE, delta(header, blocks), TARGET
    )
    yield Made(
        "two-blocks-announced",
        "The same; the decoder is told the right target.",
        BASE,
        delta(header, blocks),
        TARGET,
        announced=TARGET,
    )
    one_by_one = [Block(payload(copy(place * 7 % 500 - place, 1)), 1) for place in range(40)]
    target = bytes(BASE[place * 7 % 500] for place in range(40))
    yield Made(
        "one-byte-blocks",
        "Forty blocks of one byte: each begins with a cursor of its own.",
        BASE,
        delta(Header(BASE, target, 40, 1), one_by_one),
        target,
    )
    yield Made(
        "uneven-blocks",
        "Blocks shorter than the block size, in any order of lengths.",
        BASE,
        delta(Header(BASE, BASE[:60], 3, 50), [Block(payload(copy(0, size)), size) for size in (10, 49, 1)]),
        BASE[:60],
    )
    yield Made(
        "features-unused",
        "All features named and none used.",
        BASE,
        one_block(BASE, BASE[:9], payload(copy(0, 9)), _ALL),
        BASE[:9],
    )
    yield Made(
        "identical-to-base",
        "A target equal to its base.",
        BASE,
        one_block(BASE, BASE, payload(copy(0, 600))),
        BASE,
    )


def instructions() -> Iterator[Made]:
    """Copies and literals."""
    target = BASE[500:510] + BASE[510:515] + BASE[0:5] + BASE[5:8] + b"new" + BASE[11:14] + BASE[500:510]
    body = payload(
        copy(500, 10) + copy(0, 5) + copy(-515, 5) + copy(0, 3) + literal(1, 3) + copy(0, 3) + copy(486, 10),
        raw(b"new"),
    )
    yield Made(
        "copies",
        "Copies forward, backward and from where the cursor stands; a literal moves it on.",
        BASE,
        one_block(BASE, target, body),
        target,
    )
    target = BASE[:5] + BASE[:5] + BASE[599:]
    yield Made(
        "copy-edges",
        "Copies of the base's first and last bytes, twice the same.",
        BASE,
        one_block(BASE, target, payload(copy(0, 5) + copy(-5, 5) + copy(594, 1))),
        target,
    )
    body = payload(
        literal(2, 3) + literal(1, 2) + literal(2, 1) + literal(1, 2), raw(b"abcd"), raw(b"1234"), raw(b"")
    )
    yield Made(
        "literals",
        "Literals from two streams in turn; a stream of no bytes.",
        None,
        one_block(None, b"123ab4cd", body),
        b"123ab4cd",
    )
    listing = copy(0, 9) + copy(-1, 9) + copy(-1, 9)
    target = BASE[:9] + BASE[8:17] + BASE[16:25]
    yield Made(
        "coded-instructions",
        "Stream 0 in a zstd frame.",
        BASE,
        one_block(BASE, target, payload(build.zstd(listing))),
        target,
    )


def coders() -> Iterator[Made]:
    """The coders of streams."""
    text = b"weights of layer 17, " * 60
    yield Made(
        "zstd",
        "A zstd frame over 1 KiB.",
        None,
        one_block(None, text, payload(literal(1, len(text)), build.zstd(text))),
        text,
    )
    for name, about, shape in (
        ("lzma", "LZMA of lc 3, lp 0 and pb 2.", (3, 0, 2)),
        ("lzma-least", "LZMA without any bits of context.", (0, 0, 0)),
        ("lzma-most", "LZMA with the most bits of context.", (0, 4, 4)),
    ):
        body = payload(literal(1, len(text)), build.packed(text, *shape))
        yield Made(name, about, None, one_block(None, text, body, ("lzma",)), text)
    body = payload(build.packed(literal(1, 5) * 200), build.packed(text[:1000]))
    yield Made(
        "lzma-instructions",
        "Stream 0 as LZMA.",
        None,
        one_block(None, text[:1000], body, ("lzma",)),
        text[:1000],
    )
    small = b"abcabcabcabcabc" * 20
    coded = build.Stream(build.ZSTD, build.frame(small, window_log=10), len(small))
    yield Made(
        "zstd-small-window",
        "A frame of 300 bytes, whose window of 1 KiB is larger.",
        None,
        one_block(None, small, payload(literal(1, len(small)), coded)),
        small,
    )
    target = BASE[10:200] + b"!" + BASE[201:400]
    body = payload(literal(1, 390), build.patch(target, BASE, [(0, 600)]))
    yield Made("patch", "A patch against one range.", BASE, one_block(BASE, target, body, ("patch",)), target)
    body = payload(literal(1, 390), build.patch(target, BASE, [(201, 199), (-390, 190), (300, 5)]))
    yield Made(
        "patch-ranges",
        "A patch against three ranges, put together in their order, not the base's.",
        BASE,
        one_block(BASE, target, body, ("patch",)),
        target,
    )
    halves = [target[:200], target[200:]]
    blocks = [
        Block(payload(literal(1, len(half)), build.patch(half, BASE, [(-offset, 600)], offset)), len(half))
        for offset, half in zip((0, 200), halves, strict=True)
    ]
    yield Made(
        "patch-second-block",
        "Patches in two blocks: distances count from the block's offset.",
        BASE,
        delta(Header(BASE, target, 2, 200, ("patch",)), blocks),
        target,
    )
    body = payload(
        literal(1, 100) + literal(2, 100),
        build.patch(BASE[100:200], BASE, [(0, 300)]),
        build.patch(BASE[:100], BASE, [(0, 300)]),
    )
    yield Made(
        "patch-streams",
        "Two patches in a block, windows of their own.",
        BASE,
        one_block(BASE, BASE[100:200] + BASE[:100], body, ("patch",)),
        BASE[100:200] + BASE[:100],
    )


def maximal() -> Iterator[Made]:
    """Counts at their limits, in small files."""
    zeros = bytes(20_000)
    body = payload(literal(1, len(zeros)), build.zstd(zeros), *[raw(b"")] * (limits.MAX_STREAMS - 2))
    yield Made(
        "max-streams", "As many streams as a block may have.", None, one_block(None, zeros, body), zeros
    )
    count = limits.MAX_INSTRUCTIONS
    body = payload(build.zstd(copy(0, 1) + copy(-1, 1) * (count - 1)))
    yield Made(
        "max-instructions",
        "As many instructions as a block may have, each a copy of the same byte.",
        BASE,
        one_block(BASE, BASE[:1] * count, body),
        BASE[:1] * count,
    )
    ranges = [(0, 1)] + [(-1, 1)] * (limits.MAX_WINDOW_RANGES - 1)
    target = BASE[:1] * 20_000
    body = payload(literal(1, len(target)), build.patch(target, BASE, ranges))
    yield Made(
        "max-window-ranges",
        "As many ranges as a window may have.",
        BASE,
        one_block(BASE, target, body, ("patch",)),
        target,
    )
    large = bytes(limits.MAX_BLOCK_BYTES)
    body = payload(literal(1, len(large)), build.zstd(large))
    yield Made("max-block", "The largest block: 16 MiB of zeros.", None, one_block(None, large, body), large)
    target = bytes(1000)
    blocks = [Block(payload(literal(1, 1000), build.zstd(target)), 1000)] * 3
    yield Made(
        "equal-blocks",
        "Three blocks that hold the same bytes; their checksums differ.",
        None,
        delta(Header(None, target * 3, 3, 1000), blocks),
        target * 3,
    )


def made() -> Iterator[Made]:
    """All of this module."""
    yield from container()
    yield from instructions()
    yield from coders()
    yield from maximal()
