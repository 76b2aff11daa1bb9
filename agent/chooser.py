"""Which variant of a version suits this box: a pure choice from what was probed, never from names alone.

A variant fits when a probed runtime reads its format (the runtime it names, if it names one), has the
accelerator it asks for, the box has the memory, and the board is among those listed. Of the variants that
fit, one for an accelerator beats one for the CPU, then the manifest's order decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError
from updater.manifest import Manifest, Variant


@dataclass(frozen=True)
class RuntimeFacts:
    """A runtime that answered a real inference on this box."""

    name: str
    version: str
    formats: tuple[str, ...]
    accelerators: tuple[str, ...]


@dataclass(frozen=True)
class Box:
    """What this box is and can run, as probed.

    Attributes:
        architecture: as `uname -m` gives it.
        board: device-tree model, or "generic".
        cpu_count: logical CPUs.
        memory_bytes: physical memory.
        runtimes: that work, in order of preference.
    """

    architecture: str
    board: str
    cpu_count: int
    memory_bytes: int
    runtimes: tuple[RuntimeFacts, ...]


@dataclass(frozen=True)
class Choice:
    """A variant and the runtime that will load it."""

    variant: Variant
    runtime: str


def choose(manifest: Manifest, box: Box) -> Choice:
    """The best variant for the box.

    Raises SluiceError(NO_COMPATIBLE_VARIANT) that says for each variant why it does not fit.
    """
    fitting: list[Choice] = []
    refusals: list[str] = []
    for variant in manifest.variants:
        refusal, runtime = _fit(variant, box)
        if refusal:
            refusals.append(f"{variant.name}: {refusal}")
        else:
            fitting.append(Choice(variant, runtime))
    if not fitting:
        name = f"{manifest.model}@{manifest.version}"
        raise SluiceError(
            errors_pb2.NO_COMPATIBLE_VARIANT,
            f"no variant of {name} fits this box: {'; '.join(refusals)}",
            hint="push a variant for this kind of box, or install the runtime it needs",
            obj=name,
        )
    return min(fitting, key=lambda choice: choice.variant.accelerator == "cpu")


def _fit(variant: Variant, box: Box) -> tuple[str, str]:
    """Why a variant does not fit (empty when it does), and the runtime that would load it."""
    if variant.boards and not {box.board, box.architecture} & set(variant.boards):
        return f"is for {', '.join(variant.boards)}, this is {box.board} ({box.architecture})", ""
    if variant.min_memory_bytes > box.memory_bytes:
        return f"needs {variant.min_memory_bytes} bytes of memory, this box has {box.memory_bytes}", ""
    readers = [runtime for runtime in box.runtimes if variant.format in runtime.formats]
    if not readers:
        return f"no runtime on this box reads {variant.format} ({_names(box.runtimes)})", ""
    named = [runtime for runtime in readers if variant.runtime in ("", runtime.name)]
    if not named:
        return f"needs the runtime {variant.runtime} ({_names(box.runtimes)})", ""
    able = [runtime for runtime in named if variant.accelerator in runtime.accelerators]
    if not able:
        return f"needs {variant.accelerator}, which {_names(named)} cannot use here", ""
    return "", able[0].name


def _names(runtimes: Sequence[RuntimeFacts]) -> str:
    return "working here: " + (", ".join(runtime.name for runtime in runtimes) or "none")
