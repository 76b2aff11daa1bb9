"""`sluice delta`: make, apply and look at deltas between local files. Needs no control plane."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from fleet.cli import documents, tables
from fleet.cli.arguments import REF, Ref
from fleet.cli.command import Group
from fleet.cli.delta_page import page
from fleet.cli.progress import progress_bar
from fleet.cli.session import Session, interruptible, line
from fleet.client import ControlClient
from sluice.api.v1 import errors_pb2
from updater import delta as engine
from updater.atomic import write_atomic
from updater.delta.container import MAGIC
from updater.errors import SluiceError, os_errors
from updater.manifest import Manifest

_NO_BASE = "-"
SHOWN_REGIONS = 20  # costliest regions of a delta in its table
_FULL = click.option("--full", is_flag=True, help='A full copy, which needs no base; the same as BASE "-".')


@dataclass(frozen=True)
class _Anatomy:
    """What a delta is made of; sizes in bytes, regions as in documents.region."""

    delta_size: int
    base_size: int
    target_size: int
    regions: list[dict[str, Any]]


@click.group("delta", cls=Group)
def delta() -> None:
    """Make, apply and look at deltas between files. Needs no control plane."""


@delta.command(
    "create",
    examples=[
        ("From one version of a model file to the next.", "sluice delta create old.onnx new.onnx -o d.delta"),
        (
            "A compressed full copy, for a box that has nothing.",
            "sluice delta create - new.onnx -o full.delta",
        ),
    ],
)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="BASE TARGET")
@_FULL
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DELTA",
    help="The delta to write.",
)
@click.option(
    "--effort",
    type=click.Choice(engine.EFFORTS),
    default="default",
    show_default=True,
    help="How long to look for a smaller delta.",
)
@click.pass_obj
def create(session: Session, paths: tuple[Path, ...], full: bool, output: Path, effort: str) -> None:
    """Write the delta that turns BASE into TARGET.

    Tensors of ONNX, TFLite and safetensors files are predicted from the base's; all else is coded as bytes.
    Any two files will do. DELTA appears only when it is complete.
    """
    base, target = _two(paths, full, "TARGET")
    check_output(output, base, target)
    with interruptible("nothing was written: run the same command again"), progress_bar() as step:
        summary = engine.create(
            base,
            target,
            output,
            options=engine.EncodeOptions(effort=effort),
            progress=lambda done, total: step("encoding", done, total),
        )
    document = {
        "delta": str(output),
        "delta_digest": summary.delta_digest,
        "delta_size": summary.delta_size,
        "base_digest": summary.base_digest,
        "base_size": summary.base_size,
        "target_digest": summary.target_digest,
        "target_size": summary.target_size,
    }
    part = tables.share(summary.delta_size, summary.target_size)
    ratio = f", {part} of {target.name} ({tables.size(summary.target_size)})" if part else ""
    session.result(document, line(f"{output}: {tables.size(summary.delta_size)}{ratio}"))


@delta.command(
    "apply",
    examples=[
        ("Rebuild the new file from the old one.", "sluice delta apply old.onnx d.delta -o new.onnx"),
        ("Unpack a full copy.", "sluice delta apply - full.delta -o new.onnx"),
    ],
)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="BASE DELTA")
@_FULL
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="TARGET",
    help="The file to write.",
)
@click.pass_obj
def apply(session: Session, paths: tuple[Path, ...], full: bool, output: Path) -> None:
    """Write the file that DELTA makes from BASE.

    Bit by bit the file that the delta was made for, or an error: TARGET appears only when its digest is
    right. Work that was cut off goes on where it stopped when the command is run again.
    """
    base, path = _two(paths, full, "DELTA")
    check_output(output, None, path)
    with (
        interruptible("run the same command again: it goes on where this one stopped"),
        progress_bar() as step,
    ):
        digest = engine.apply(base, path, output, progress=lambda done, total: step("applying", done, total))
    with os_errors("reading", output):
        written = output.stat().st_size
    document = {"target": str(output), "target_digest": digest, "target_size": written}
    session.result(document, line(f"{output}: {tables.size(written)}, {digest}"))


@delta.command(
    "describe",
    short_help="Show what a delta consists of, costliest first.",
    examples=[
        ("What would an update cost, and where do its bytes go?", "sluice delta describe old.onnx new.onnx"),
        ("Look into a delta that was made before.", "sluice delta describe old.onnx d.delta"),
        ("The same as a page to look at.", "sluice delta describe old.onnx new.onnx --html delta.html"),
        ("Between two published versions.", "sluice delta describe --server detector@1 detector@2"),
    ],
)
@click.argument("paths", nargs=-1, metavar="BASE TARGET")
@_FULL
@click.option("--server", is_flag=True, help="BASE and TARGET are versions; the control plane has the delta.")
@click.option(
    "--variant", help="With --server: of which variant. Default: the target's first that both have."
)
@click.option("--all", "everything", is_flag=True, help="Every region, however cheap. Always so with --json.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page that shows where the bytes went.",
)
@click.pass_obj
def describe(
    session: Session,
    paths: tuple[str, ...],
    full: bool,
    server: bool,
    variant: str | None,
    everything: bool,
    html: Path | None,
) -> None:
    """Show what a delta consists of, tensor by tensor, costliest first.

    TARGET is a file, or a delta that was made from BASE. Nothing is kept.
    """
    if variant is not None and not server:
        raise click.UsageError("--variant goes with --server")
    if server:
        if html is not None:
            check_output(html)
        with session.client() as client:
            anatomy = _from_server(client, paths, full, variant)
        _show(session, anatomy, everything, html, paths)
        return
    base, path = _two(tuple(Path(name) for name in paths), full, "TARGET")
    if html is not None:
        check_output(html, base, path)
    with interruptible("nothing was written"):
        anatomy = _from_files(base, path)
    _show(session, anatomy, everything, html, [Path(name).name for name in paths])


def _two(paths: Sequence[Path], full: bool, second: str) -> tuple[Path | None, Path]:
    """Base (None for a full copy) and the second file of the arguments; both must be there."""
    if len(paths) != (1 if full else 2):
        wanted = f"--full {second}" if full else f'BASE and {second} (BASE "-" for a full copy)'
        raise click.UsageError(f"expected {wanted}, got {len(paths)} arguments")
    base = None if full or str(paths[0]) == _NO_BASE else paths[0]
    for path in (base, paths[-1]):
        if path is not None and not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise click.UsageError(f"the file {str(path)!r} {what}")
    return base, paths[-1]


def check_output(output: Path, *inputs: Path | None) -> None:
    """Refuses an output that is a directory, lies in none, or is one of the inputs."""
    if output.is_dir():
        raise click.UsageError(f"{str(output)!r} is a directory; -o takes the name of a file")
    if not output.parent.is_dir():
        raise click.UsageError(f"there is no directory {str(output.parent)!r} for the output")
    for path in inputs:
        if path is not None and output.exists() and output.samefile(path):
            raise click.UsageError(f"the output {str(output)!r} is one of the inputs")


def _from_files(base: Path | None, path: Path) -> _Anatomy:
    """The anatomy of a delta, made for the occasion unless `path` is one."""
    with os_errors("reading", path), path.open("rb") as file:
        is_delta = file.read(len(MAGIC)) == MAGIC
        path_size = path.stat().st_size
    with os_errors("reading", base):
        base_size = base.stat().st_size if base is not None else 0
    if is_delta:
        regions = engine.describe(base, path)
        target_size = sum(region.target_length for region in regions)
        return _Anatomy(path_size, base_size, target_size, [documents.region(entry) for entry in regions])
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory, progress_bar() as step:
        made = Path(directory) / "delta"
        summary = engine.create(base, path, made, progress=lambda done, total: step("encoding", done, total))
    found = [documents.region(entry) for entry in summary.regions]
    return _Anatomy(summary.delta_size, summary.base_size, summary.target_size, found)


def _from_server(client: ControlClient, names: Sequence[str], full: bool, variant: str | None) -> _Anatomy:
    """The anatomy of the delta between the model files of two published versions."""
    if len(names) != (1 if full else 2):
        wanted = "--full TARGET" if full else "BASE and TARGET, for example detector@1 detector@2"
        raise click.UsageError(f"--server expects {wanted}; got {len(names)} arguments")
    target = _manifest(client, names[-1])
    if full or names[0] == _NO_BASE:
        chosen = target.variant(variant) if variant else target.variants[0]
        base_digest = ""
    else:
        base = _manifest(client, names[0])
        chosen = target.variant(variant or _shared_variant(base, target))
        base_digest = base.variant(chosen.name).model_file.digest
    found = client.describe_delta(base_digest, chosen.model_file.digest)
    regions = [documents.region(entry) for entry in found.regions]
    return _Anatomy(found.delta_size, found.base_size, found.target_size, regions)


def _manifest(client: ControlClient, name: str) -> Manifest:
    ref: Ref = REF.convert(name, None, click.get_current_context())
    return Manifest.parse(ref.get(client).manifest)


def _shared_variant(base: Manifest, target: Manifest) -> str:
    """The first variant of the target that the base has too."""
    known = [variant.name for variant in base.variants]
    for variant in target.variants:
        if variant.name in known:
            return variant.name
    raise SluiceError(
        errors_pb2.NO_COMPATIBLE_VARIANT,
        f"{base.model}@{base.version} and {target.model}@{target.version} have no variant of the same name",
        hint=f"or the full copy: sluice delta describe --server - {target.model}@{target.version}",
    )


def _show(
    session: Session, anatomy: _Anatomy, everything: bool, html: Path | None, names: Sequence[str]
) -> None:
    if html is not None:
        title = " → ".join(names) if len(names) > 1 and names[0] != _NO_BASE else f"{names[-1]}, a full copy"
        written = page(title, anatomy.delta_size, anatomy.target_size, anatomy.regions)
        write_atomic(html, written.encode("utf-8", "replace"))
    document = {
        "delta_size": anatomy.delta_size,
        "base_size": anatomy.base_size,
        "target_size": anatomy.target_size,
        "regions": anatomy.regions,
    }
    costly = sorted(anatomy.regions, key=lambda entry: (-entry["coded_bytes"], entry["target_offset"]))
    shown = costly if everything else costly[:SHOWN_REGIONS]
    rows = [
        (
            tables.size(entry["coded_bytes"]),
            tables.share(entry["coded_bytes"], anatomy.delta_size),
            "" if entry["bits_per_weight"] is None else f"{entry['bits_per_weight']:.2f}",
            entry["dtype"],
            " ".join(filter(None, (entry["instruction"], entry["predictor"]))),
            _pairing(entry),
        )
        for entry in shown
    ]
    part = tables.share(anatomy.delta_size, anatomy.target_size)
    below: list[RenderableType] = []
    if len(shown) < len(costly):
        rest = sum(entry["coded_bytes"] for entry in costly[len(shown) :])
        below.append(
            line(f"and {len(costly) - len(shown)} more, {tables.size(rest)} together: see them with --all")
        )
    session.result(
        document,
        line(
            f"{tables.size(anatomy.delta_size)} for {tables.size(anatomy.target_size)}"
            + (f" ({part})" if part else "")
        ),
        Text(),
        tables.Rows(
            ("CODED", "SHARE", "BITS/WEIGHT", "TYPE", "BY", "REGION~"),
            rows,
            right=("CODED", "SHARE", "BITS/WEIGHT"),
        ),
        *below,
    )


def _pairing(entry: dict[str, Any]) -> str:
    """The region's name, and whence in the base it comes when that has another name."""
    name = entry["name"] or "(between tensors)"
    moved = entry["base_name"] not in ("", entry["name"])
    return f"{name} ← {entry['base_name']}" if moved else name
