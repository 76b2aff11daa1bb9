"""Delta sizes and speeds beside the peers: `make bench-delta`, or `python -m benchmarks.delta [PAIR…]`.

Takes every pair of model files below --pairs (folders with `old.*` and `new.*`; by default the folder that
SLUICE_PAIRS names, or ../shared/pairs where it is there) and the demo's own digits models, trained on the
spot. Each tool encodes and decodes each pair in this run on this machine, and each result is compared with
the target byte by byte. Ratios hold between machines; seconds do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.peers import PEERS, Measurement, Peer
from edge_tests.demo import digits
from updater import delta

DEFAULT_PAIRS = Path(__file__).resolve().parents[2] / "shared" / "pairs"
OURS = "sluice"
# Below this a patch is mostly framing, and a ratio of two such sizes says nothing about the coding.
MIN_BEST_FOR_MEAN_BYTES = 1024


class Sluice(Peer):
    """sluice itself, in this process: no start of a program is counted."""

    name = OURS

    def missing(self) -> str:
        return ""

    def encode(self, old: Path, new: Path, patch: Path) -> None:
        delta.create(old, new, patch)

    def decode(self, old: Path, patch: Path, out: Path) -> None:
        delta.apply(old, patch, out)


@dataclass(frozen=True)
class Pair:
    """Two files, old and new."""

    name: str
    old: Path
    new: Path


def find_pairs(folder: Path, wanted: list[str]) -> list[Pair]:
    """The pairs below a folder; all, or those named."""
    pairs = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        old, new = list(entry.glob("old.*")), list(entry.glob("new.*"))
        if len(old) == 1 and len(new) == 1 and (not wanted or entry.name in wanted):
            pairs.append(Pair(entry.name, old[0], new[0]))
    return pairs


def digits_pairs(folder: Path) -> list[Pair]:
    """The demo's models: v1 and v2 of one classifier, really trained here."""
    models = digits.build(folder)
    return [
        Pair(f"digits_{name}", models.model_path(1, name), models.model_path(2, name))
        for name in models.variant_names
    ]


def best_peer(row: dict[str, Measurement]) -> tuple[str, int] | None:
    """The peer with the smallest patch of a row, and its size in bytes."""
    sizes = [(measured.patch_bytes, name) for name, measured in row.items() if name != OURS]
    return (min(sizes)[1], min(sizes)[0]) if sizes else None


def ratio_to_best(row: dict[str, Measurement]) -> float | None:
    """Our patch's size over the best peer's."""
    best = best_peer(row)
    return row[OURS].patch_bytes / best[1] if best else None


def geometric_mean(rows: list[dict[str, Measurement]]) -> float | None:
    """Of the ratios to the best peer, over pairs whose best patch is not mere framing."""
    ratios = [
        row[OURS].patch_bytes / best[1]
        for row in rows
        if (best := best_peer(row)) is not None and best[1] > MIN_BEST_FOR_MEAN_BYTES
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def size_table(rows: dict[str, dict[str, Measurement]], full: dict[str, int], names: list[str]) -> Table:
    table = Table(title="Delta size, bytes", title_justify="left")
    table.add_column("pair")
    for heading in ["full", *names, "to best peer"]:
        table.add_column(heading, justify="right")
    for pair, row in rows.items():
        ratio = ratio_to_best(row)
        cells = [f"{row[name].patch_bytes:,}" if name in row else "-" for name in names]
        table.add_row(pair, f"{full[pair]:,}", *cells, f"{ratio:.2f}" if ratio else "-")
    return table


def speed_table(rows: dict[str, dict[str, Measurement]], names: list[str]) -> Table:
    table = Table(title="Encode / decode, seconds (peers with their process start)", title_justify="left")
    table.add_column("pair")
    for heading in names:
        table.add_column(heading, justify="right")
    for pair, row in rows.items():
        cells = [f"{row[n].encode_s:.2f} / {row[n].decode_s:.2f}" if n in row else "-" for n in names]
        table.add_row(pair, *cells)
    return table


def machine() -> str:
    """What this ran on, for whoever reads the figures."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", nargs="*", help="only these pairs (default: all found)")
    parser.add_argument("--pairs", type=Path, default=Path(os.environ.get("SLUICE_PAIRS", DEFAULT_PAIRS)))
    parser.add_argument("--json", type=Path, help="write every figure to this file as well")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)

    tools: list[Peer] = [Sluice()]
    for peer in PEERS:
        if why := peer.missing():
            console.print(f"left out: {peer.name} ({why})")
        else:
            tools.append(peer)
    names = [tool.name for tool in tools]

    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as scratch_name:
        scratch = Path(scratch_name)
        pairs = find_pairs(arguments.pairs, arguments.pair)
        if not arguments.pairs.is_dir():
            console.print(f"no pairs at {arguments.pairs}: only the demo's models are measured")
        if not arguments.pair or any(name.startswith("digits_") for name in arguments.pair):
            pairs += digits_pairs(scratch / "digits")
        if not pairs:
            console.print(f"no pair named {', '.join(arguments.pair)} below {arguments.pairs}")
            return 2
        rows: dict[str, dict[str, Measurement]] = {}
        full: dict[str, int] = {}
        start = time.perf_counter()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("measuring", total=len(pairs) * len(tools))
            for pair in pairs:
                full[pair.name] = pair.new.stat().st_size
                rows[pair.name] = {}
                for tool in tools:
                    progress.update(task, description=f"{pair.name}: {tool.name}")
                    rows[pair.name][tool.name] = tool.measure(pair.old, pair.new, scratch)
                    progress.advance(task)

    console.print(size_table(rows, full, names))
    console.print(speed_table(rows, names))
    mean = geometric_mean(list(rows.values()))
    if mean is not None:
        console.print(
            f"geometric mean of sluice to the best peer: {mean:.3f} "
            f"(pairs whose best peer needs over {MIN_BEST_FOR_MEAN_BYTES} bytes)"
        )
    seconds = time.perf_counter() - start
    console.print(f"{len(pairs)} pairs, every patch applied and compared, {seconds:.0f} s on {machine()}")
    if arguments.json:
        figures = {
            pair: {"full_bytes": full[pair]} | {name: asdict(m) for name, m in row.items()}
            for pair, row in rows.items()
        }
        arguments.json.write_text(json.dumps({"machine": machine(), "pairs": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
