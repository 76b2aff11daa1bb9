"""Valid vectors of skeletons, and of programs among other instructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from edge_tests.conformance.vectors import build, programs
from edge_tests.conformance.vectors.build import Made
from edge_tests.conformance.vectors.samples import NUMBERS, PLACES, TEXT, noise
from edge_tests.conformance.vectors.valid_programs import same
from updater.delta.program import records as ops
from updater.delta.program.records import Record


def _graph(prefix: bytes, nodes: Iterable[int]) -> bytes:
    """What a graph looks like: names behind their lengths, in nodes behind theirs."""
    out = b""
    for node in nodes:
        names = [prefix + b"block.%d.%s" % (node, part) for part in (b"weight", b"bias", b"output")]
        inside = b"".join(bytes([10, len(name)]) + name for name in names)
        out += bytes([18, len(inside)]) + inside
    return out


def tracked(noise: bytes) -> Iterator[Made]:
    """Skeletons coded along the base."""
    features = ("program", "tracking")
    base = noise + _graph(b"model.branch.", range(20)) + NUMBERS[:200]
    for name, about, target in (
        ("shorter", "Names that lose their beginning.", _graph(b"", range(20))),
        ("longer", "Names that get another beginning.", _graph(b"the.model.branch.", range(20)) + noise),
        ("back", "Nodes in another order.", _graph(b"model.", (9, 10, 11, 3, 4, 5, 17, 18, 19, 0, 1))),
    ):
        of = programs.known(base, [], len(target), (0, len(base)))
        frame = programs.skeleton_frame(programs.TRACKED, of, target)
        parts = programs.Parts(programs.code([], len(target), 0), (0, len(base)), frame=frame)
        yield Made(
            f"skeleton-tracked-{name}",
            about,
            base,
            programs.delta(base, target, parts.encode(), features),
            target,
        )
    target = _graph(b"model.", range(8)) + noise
    frame = programs.skeleton_frame(programs.TRACKED, programs.known(b"", [], len(target), (0, 0)), target)
    parts = programs.Parts(programs.code([], len(target), 0), frame=frame)
    data = programs.delta(None, target, parts.encode(), features)
    yield Made("skeleton-tracked-without-base", "Coded along a base that is not there.", None, data, target)


def made() -> Iterator[Made]:
    """All of this module."""
    record = same("weights", 40)
    target = (
        b"layers 1: weights, and what is new here " + NUMBERS[PLACES["weights"].at :][:768] + TEXT[20:150]
    )
    window = (0, len(NUMBERS))
    base_parts = programs.encode(NUMBERS, target, [record])
    of = programs.known(NUMBERS, [record], len(target), window)
    between = target[:40] + target[808:]
    for way, name in enumerate(("raw", "zstd", "zstd-whole", "model")):
        frame = programs.skeleton_frame(way, of, between)
        program = replace(base_parts, window=window, frame=frame).encode()
        yield Made(
            f"skeleton-{name}",
            f"The bytes between records, way {way}.",
            NUMBERS,
            programs.delta(NUMBERS, target, program),
            target,
        )
    text = b"layer 3: weights and biases; layer 77: weights and biases; " * 4 + noise(40, 4)
    of = programs.known(NUMBERS, [], len(text), window)
    parts = programs.Parts(
        programs.code([], len(text), 0), window, frame=programs.skeleton_frame(programs.MODEL, of, text)
    )
    yield Made(
        "skeleton-alone",
        "A program without records, by the byte model.",
        NUMBERS,
        programs.delta(NUMBERS, text, parts.encode()),
        text,
    )
    of = programs.known(b"", [], len(text), (0, 0))
    parts = programs.Parts(
        programs.code([], len(text), 0), frame=programs.skeleton_frame(programs.MODEL, of, text)
    )
    yield Made(
        "skeleton-without-base",
        "The byte model knows nothing but what it writes.",
        None,
        programs.delta(None, text, parts.encode()),
        text,
    )
    yield from tracked(noise(40, 4))
    offset = 30
    body = NUMBERS[40:100] + text
    of = programs.known(NUMBERS, [], len(body), (20, 200), offset)
    parts = programs.Parts(
        programs.code([], len(body), offset),
        (20 - offset, 200),
        frame=programs.skeleton_frame(programs.ZSTD, of, body),
    )
    whole = NUMBERS[:30] + body
    yield Made(
        "program-behind-copy",
        "A program behind a copy: its addresses count from its own begin.",
        NUMBERS,
        build.one_block(
            NUMBERS, whole, programs.block(parts.encode(), len(body), build.copy(0, 30)), ("program",)
        ),
        whole,
    )
    first, second = NUMBERS[:300], NUMBERS[300:900]
    place = PLACES["weights"]
    record = Record(ops.SAME, ops.F32, 0, 100, base=300)
    blocks = []
    for number, (part, found) in enumerate(((first, []), (second, [record]))):
        parts = programs.encode(NUMBERS, part, found, offset=300 * number)
        blocks.append(build.Block(programs.block(parts.encode(), len(part)), len(part)))
    assert place.at < 300
    header = build.Header(NUMBERS, first + second, 2, 600, ("program",))
    yield Made(
        "program-blocks", "Programs in two blocks.", NUMBERS, build.delta(header, blocks), first + second
    )
