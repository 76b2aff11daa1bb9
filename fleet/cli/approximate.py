"""`sluice delta approximate`: an update that is nearly the wanted one, where the exact delta is too much."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from fleet.approximate import Bounds, Outcome, find_approximate
from fleet.approximate_search import Trial
from fleet.cli import tables
from fleet.cli.approximate_plot import plot_svg
from fleet.cli.command import Command
from fleet.cli.delta import check_output
from fleet.cli.progress import progress_bar
from fleet.cli.session import Session, interruptible, line, render
from sluice.api.v1 import errors_pb2
from updater.approximate import METHODS
from updater.atomic import write_atomic
from updater.errors import SluiceError

SHOWN_LAYERS = 20  # layers with the largest error in the table

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_OUT = click.Path(path_type=Path, dir_okay=False)


@click.command(
    "approximate",
    cls=Command,
    short_help="Make a target whose delta fits a budget, nearly as good.",
    examples=[
        (
            "At most 50 kB over the link, checked on the golden inputs.",
            (
                "sluice delta approximate old.onnx new.onnx -o near.onnx \\\n"
                "    --method topk --budget 50000 --golden golden.npz"
            ),
        ),
        (
            "The sign of every change, with a picture; nothing runs the model.",
            (
                "sluice delta approximate old.onnx new.onnx -o near.onnx \\\n"
                "    --method sign --budget 200000 --force --plot near.svg"
            ),
        ),
    ],
)
@click.argument("base", type=_FILE, metavar="BASE")
@click.argument("target", type=_FILE, metavar="TARGET")
@click.option("-o", "--output", type=_OUT, required=True, metavar="OUT", help="The file to write.")
@click.option(
    "--method", type=click.Choice(METHODS), required=True, help="What is kept of each layer's change."
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    required=True,
    metavar="BYTES",
    help="The most bytes that the delta from BASE to OUT may take.",
)
@click.option("--golden", type=_FILE, metavar="FILE", help="Golden inputs and outputs of TARGET, an .npz.")
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    default=Bounds.min_cosine,
    show_default=True,
    help="Least cosine of each golden output.",
)
@click.option(
    "--max-layer-mse",
    type=click.FloatRange(min=0),
    default=Bounds.max_layer_mse,
    show_default=True,
    help="Largest squared error of a layer, relative to its weights'.",
)
@click.option("--force", is_flag=True, help="Write OUT even if it falls short, or without --golden.")
@click.option("--plot", type=_OUT, metavar="FILE", help="Draw bytes against error, an .svg.")
@click.pass_obj
def approximate(
    session: Session,
    base: Path,
    target: Path,
    output: Path,
    method: str,
    budget: int,
    golden: Path | None,
    min_cosine: float,
    max_layer_mse: float,
    force: bool,
    plot: Path | None,
) -> None:
    """Write OUT: BASE with the best part of the change to TARGET.

    What is kept is searched so that the exact delta from BASE to OUT takes at most the budget.
    OUT is a model file of its own; its golden outputs and every layer are held against TARGET's,
    and it is refused when either is too far off. See docs/approximate.md.
    """
    if golden is None and not force:
        raise click.UsageError("give --golden to hold the outputs against, or --force to go without")
    for path in filter(None, (output, plot)):
        check_output(path, base, target, golden)
    if plot is not None and plot.absolute() == output.absolute():
        raise click.UsageError("--plot and -o name the same file")
    with interruptible("nothing was written: run the same command again"), progress_bar() as step:
        outcome = find_approximate(
            base,
            target,
            method,
            budget,
            golden=golden,
            bounds=Bounds(min_cosine, max_layer_mse),
            progress=step,
        )
        if plot is not None:
            write_atomic(plot, plot_svg(outcome, budget, f"{base.name} → {target.name}").encode())
        if not outcome.shortfalls or force:
            outcome.write(target, output)
    shown = _figures(outcome, budget)
    if outcome.shortfalls and not force:
        if not session.json:
            session.note(render(Lines(*shown), sys.stderr))
        raise SluiceError(
            errors_pb2.GOLDEN_MISMATCH,
            f"{output} was not written: {'; '.join(outcome.shortfalls)}",
            hint="give a larger --budget, try another --method, or accept it with --force",
            obj=str(output),
        )
    warnings = [line(f"forced although {shortfall}", "yellow") for shortfall in outcome.shortfalls]
    session.result(_document(outcome, output, budget, golden), *shown, *warnings)


def _figures(outcome: Outcome, budget: int) -> list[RenderableType]:
    best = outcome.best
    layers = sorted(
        zip(best.tally.layers, best.layer_bytes, strict=True), key=lambda pair: -pair[0].relative_mse
    )
    rows = [
        (
            f"{layer.relative_mse:.2e}",
            f"{layer.cosine:.3f}",
            f"{100 * layer.explained:.1f} %",
            f"{100 * layer.changed / layer.elements:.1f} %",
            tables.size(coded),
            layer.name,
        )
        for layer, coded in layers[:SHOWN_LAYERS]
    ]
    rest = best.delta_size - sum(best.layer_bytes)
    cosine = _cosines(outcome)
    below = [line(f"and {len(layers) - len(rows)} more layers")] if len(layers) > len(rows) else []
    return [
        line(
            f"{tables.size(best.delta_size)} of {tables.size(budget)}: "
            f"{_times(outcome.target_size, best.delta_size)} smaller than the file, "
            f"{_times(outcome.exact_delta_size, best.delta_size)} than the exact delta "
            f"({tables.size(outcome.exact_delta_size)})"
        ),
        line(f"kept {best.amount:,} of {outcome.most:,} {outcome.unit}; {cosine}"),
        Text(),
        tables.Rows(
            ("REL. MSE", "COSINE", "KEPT", "CHANGED", "CODED", "LAYER~"),
            rows,
            right=("REL. MSE", "COSINE", "KEPT", "CHANGED", "CODED"),
        ),
        *below,
        line(f"all else is the target's, exactly: {tables.size(rest)}"),
    ]


def _cosines(outcome: Outcome) -> str:
    if outcome.best.cosine is None or outcome.base_cosine is None:
        return "golden outputs were not checked"
    return f"golden outputs: cosine {outcome.best.cosine:.6f} (without the update {outcome.base_cosine:.6f})"


def _times(whole: int, part: int) -> str:
    return f"{whole / max(1, part):.1f}x"


def _document(outcome: Outcome, output: Path, budget: int, golden: Path | None) -> dict[str, Any]:
    return {
        "output": str(output),
        "method": outcome.method,
        "budget": budget,
        "target_size": outcome.target_size,
        "exact_delta_size": outcome.exact_delta_size,
        "golden": str(golden) if golden is not None else None,
        "base_cosine": outcome.base_cosine,
        "unit": outcome.unit,
        "most": outcome.most,
        **_trial(outcome.best),
        "shortfalls": list(outcome.shortfalls),
        "layers": [
            {
                "name": layer.name,
                "dtype": layer.dtype,
                "elements": layer.elements,
                "changed": layer.changed,
                "relative_mse": _finite(layer.relative_mse),
                "cosine": layer.cosine,
                "explained": _finite(layer.explained),
                "coded_bytes": coded,
            }
            for layer, coded in zip(outcome.best.tally.layers, outcome.best.layer_bytes, strict=True)
        ],
        "trials": [_trial(trial) for trial in outcome.trials],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "kept": trial.amount,
        "rounding": trial.rounding.name,
        "delta_size": trial.delta_size,
        "cosine": trial.cosine,
        "explained": _finite(trial.tally.explained),
        "max_layer_mse": _finite(trial.tally.worst.relative_mse),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
