"""Delta sizes and speeds beside the peers: `make bench-delta`, or `python -m benchmarks.delta [PAIR…]`.

Takes every pair of model files below --pairs (folders with `old.*` and `new.*`; by default the folder that
SLUICE_PAIRS names, or ../shared/pairs where it is there), the demo's own digits models, trained on the spot,
and with --minilm the MiniLM pairs (benchmarks/minilm.py). Each tool encodes and decodes each pair in this run
on this machine, and each result is compared with the target byte by byte; nothing is taken from an earlier
run. Our sizes are those at effort max, our speeds those at effort default, with the sizes that go with them.
Slow tools leave out pairs with a file over 30 MiB, unless --all asks for them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks import minilm, ours, report, targets
from benchmarks.peers import PEERS, SLOW_BYTES, Peer
from benchmarks.report import Table
from benchmarks.targets import SIZES, SPEEDS, PairResult
from benchmarks.xor_planes import XorPlanes
from edge_tests.demo import digits

DEFAULT_PAIRS = Path(__file__).resolve().parents[2] / "shared" / "pairs"
NONE = "-"
DELTAS = ("delta", "Deltas")
ALL_PEERS: tuple[Peer, ...] = (*PEERS, XorPlanes())


@dataclass(frozen=True)
class Pair:
    """Two files, old and new; `shared` pairs count for the geometric mean."""

    name: str
    old: Path
    new: Path
    shared: bool = False

    @property
    def largest(self) -> int:
        return max(self.old.stat().st_size, self.new.stat().st_size)


@dataclass
class Run:
    """What a run measured, and what it left out and why."""

    results: dict[str, PairResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_pairs(folder: Path) -> list[Pair]:
    """The pairs below a folder."""
    pairs = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        old, new = list(entry.glob("old.*")), list(entry.glob("new.*"))
        if len(old) == 1 and len(new) == 1:
            pairs.append(Pair(entry.name, old[0], new[0], shared=True))
    return pairs


def digits_pairs(folder: Path) -> list[Pair]:
    """The demo's models: v1 and v2 of one classifier, really trained here."""
    models = digits.build(folder)
    return [
        Pair(f"digits_{name}", models.model_path(1, name), models.model_path(2, name))
        for name in models.variant_names
    ]


def gather(folder: Path, wanted: Sequence[str], scratch: Path, *, with_minilm: bool) -> list[Pair]:
    """All pairs of this run, or those named. Raises RuntimeError when the MiniLM pairs cannot be made."""
    pairs = find_pairs(folder)
    if not wanted or any(name.startswith("digits_") for name in wanted):
        pairs += digits_pairs(scratch / "digits")
    if with_minilm:
        pairs += [Pair(pair.name, pair.old, pair.new) for pair in minilm.pairs()]
    return [pair for pair in pairs if not wanted or pair.name in wanted]


def measure(pairs: Sequence[Pair], tools: Sequence[Peer], scratch: Path, *, everything: bool) -> Run:
    """Every tool on every pair. Where a peer fails there is no figure and a note; we may not fail."""
    run = Run()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(pairs) * len(tools))
        for pair in pairs:
            measured, left_out = {}, []
            for tool in tools:
                progress.update(task, description=f"{pair.name}: {tool.name}")
                if tool.slow and not everything and pair.largest > SLOW_BYTES:
                    left_out.append(tool.name)
                else:
                    try:
                        measured[tool.name] = tool.measure(pair.old, pair.new, scratch)
                    except RuntimeError as error:
                        if isinstance(tool, ours.Sluice):
                            raise
                        run.notes.append(f"{tool.name} failed on {pair.name}: {error}")
                progress.advance(task)
            if left_out:
                run.notes.append(
                    f"{pair.name} is over {SLOW_BYTES >> 20} MiB; not run on it without --all, being slow: "
                    f"{', '.join(left_out)}."
                )
            run.results[pair.name] = PairResult(pair.new.stat().st_size, pair.shared, measured)
    return run


def size_table(results: Mapping[str, PairResult], names: Sequence[str]) -> Table:
    rows = []
    for pair, result in results.items():
        ratio = targets.ratio_to_best(result)
        cells = [f"{result.tools[name].patch_bytes:,}" if name in result.tools else NONE for name in names]
        ours = result.tools[SIZES]
        entropy = f"{ours.pool_bytes:,} / {ours.entropy_bytes:,.0f}" if ours.entropy_bytes else NONE
        rows.append([pair, f"{result.full_bytes:,}", *cells, f"{ratio:.2f}" if ratio else NONE, entropy])
    return Table("Size, bytes", ["pair", "full", *names, "max to best peer", "residuals / entropy"], rows)


def speed_table(results: Mapping[str, PairResult], names: Sequence[str]) -> Table:
    rows = []
    for pair, result in results.items():
        cells = []
        for name in names:
            tool = result.tools.get(name)
            cells.append(f"{tool.encode_s:.2f} / {tool.decode_s:.3f}" if tool else NONE)
        anon = result.tools[SPEEDS].decode_anon_bytes
        rows.append([pair, *cells, f"{anon / 1e6:.0f}" if anon else NONE])
    return Table("Encode / decode, seconds", ["pair", *names, "decode RssAnon, MB"], rows)


def target_table(results: Mapping[str, PairResult]) -> Table:
    words = {True: "yes", False: "NO", None: NONE}
    rows = [[check.what, check.target, check.measured, words[check.met]] for check in targets.checks(results)]
    return Table("Targets", ["target", "bound", "measured", "met"], rows, text=(0, 1, 2, 3))


def available(console: Console, wanted: Collection[str]) -> tuple[list[Peer], list[str]]:
    """The tools that can run here, ours first, then the wanted peers; and notes on those that cannot."""
    tools: list[Peer] = [ours.Sluice("max"), ours.Sluice("default")]
    notes = []
    for peer in ALL_PEERS:
        if peer.name not in wanted:
            continue
        if why := peer.missing():
            notes.append(f"Left out: {peer.name} ({why}).")
            console.print(notes[-1])
        else:
            tools.append(peer)
    return tools, notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", nargs="*", help="only these pairs (default: all found)")
    parser.add_argument("--pairs", type=Path, default=Path(os.environ.get("SLUICE_PAIRS", DEFAULT_PAIRS)))
    parser.add_argument("--minilm", action="store_true", help="the MiniLM pairs too, made on the first use")
    parser.add_argument(
        "--all", action="store_true", help="slow tools on large pairs too: hours with --minilm"
    )
    parser.add_argument("--peers", help="only these peers, separated by commas")
    parser.add_argument("--json", type=Path, help="write every figure to this file as well")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    wanted_peers = arguments.peers.split(",") if arguments.peers else [peer.name for peer in ALL_PEERS]
    if unknown := set(wanted_peers) - {peer.name for peer in ALL_PEERS}:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    tools, notes = available(console, wanted_peers)
    if arguments.peers:
        notes.append(f"Only these peers ran, and the best peer is the best of them: {arguments.peers}.")
    names = [tool.name for tool in tools]
    start = time.perf_counter()

    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as scratch_name:
        scratch = Path(scratch_name)
        try:
            pairs = gather(arguments.pairs, arguments.pair, scratch, with_minilm=arguments.minilm)
        except RuntimeError as error:
            console.print(f"no MiniLM pairs: {error}")
            return 2
        if not arguments.pairs.is_dir():
            notes.append("The shared pairs were not there: only pairs that are made on the spot.")
            console.print(f"no pairs at {arguments.pairs}")
        if absent := set(arguments.pair) - {pair.name for pair in pairs}:
            console.print(f"no pair named {', '.join(sorted(absent))}; MiniLM pairs need --minilm")
            return 2
        run = measure(pairs, tools, scratch, everything=arguments.all)

    tables = [size_table(run.results, names), speed_table(run.results, names), target_table(run.results)]
    for table in tables:
        console.print(table.rich())
    for note in run.notes:
        console.print(f"note: {note}")
    versions = {tool.name: version for tool in tools if (version := tool.version())}
    notes.append(f"Peers: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    console.print(notes[-1])
    seconds = time.perf_counter() - start
    console.print(
        f"{len(pairs)} pairs, every patch applied and compared, {seconds:.0f} s on {report.machine()}"
    )
    if arguments.json:
        document = {"machine": report.machine(), "date": report.today(), "versions": versions}
        document |= {"pairs": {name: asdict(result) for name, result in run.results.items()}}
        document |= {"targets": [asdict(check) for check in targets.checks(run.results)]}
        document |= {"notes": [*notes, *run.notes]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.write:
        method = (
            "Every patch was applied and compared byte by byte. sluice encodes on all cores and decodes on "
            "one, in a process of its own, without its start; other programs count with their start, ZipNN "
            "without PyTorch's. Of up to three decodes the fastest counts; ours end with the target fsynced."
        )
        flags = [flag for flag in ("--minilm", "--all") if flag in sys.argv]
        flags += ["--peers", arguments.peers] if arguments.peers else []
        command = " ".join(["python -m benchmarks.delta", *flags, *arguments.pair])
        name, title = ("delta-all", "Deltas of large files, slow peers too") if arguments.all else DELTAS
        report.write_section(name, report.section(title, command, [method, *notes, *run.notes], tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
