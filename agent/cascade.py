"""Cascades: a small model answers first, and hands the samples that it is unsure of to a larger one. Pure.

How sure a model is of a sample is its score, `0.6 · confidence + 0.4 · (1 − normalised entropy)`:
confidence is the largest probability, the entropy that of all of them over the logarithm of their number. A
score under the threshold (0.7) hands the sample on. Several positions in a sample (tokens, say) give it the
score of the least sure. One class counts as two, itself and not.

A version declares its cascade in its variant's options ("cascade_to"), so that it ships as any version
does. The model named answers for itself too and may have a cascade of its own. `check` finds what cannot
work before anything is served: a cycle, a model that is not there, tensors that do not fit.

Rules: what is no probability (NaN, infinite, a sum far from 1) has the score 0: it is handed on; every
sample is answered by exactly one model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.limits import MAX_CASCADE_STEPS, MAX_NAME_CHARACTERS
from runtimes.interface import TensorSpec
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

LOGITS, PROBABILITIES = "logits", "probabilities"
SCORED = ("FP32", "FP16", "FP64")  # datatypes of outputs that can be scored
SUM_TOLERANCE = 0.05  # of probabilities to 1: outputs may be half precision or dequantised
_TARGET = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?:@([1-9][0-9]{0,15}))?")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Cascade:
    """What a version's options say.

    Attributes:
        to: the model that answers what this one is unsure of, possibly "model@version"; its active version
            where none is named.
        threshold: a score under it hands the sample on; 0: none is, over 1: all are.
        confidence_weight: of the largest probability.
        entropy_weight: of 1 − normalised entropy.
        output: which output is scored; empty: the first that holds floating-point numbers.
        scores: whether that output holds LOGITS or PROBABILITIES.
    """

    to: str
    threshold: float = 0.7
    confidence_weight: float = 0.6
    entropy_weight: float = 0.4
    output: str = ""
    scores: str = LOGITS

    @property
    def target(self) -> tuple[str, str]:
        """Model and version, the latter empty for the active one; ("", "") if `to` names no model."""
        found = _TARGET.fullmatch(self.to)
        return ("", "") if found is None else (found[1], found[2] or "")


@dataclass(frozen=True)
class Member:
    """A version as a part of cascades."""

    model: str
    version: int
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    cascade: Cascade | None = None

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"


# Scoring.


def scored_output(cascade: Cascade, outputs: Sequence[TensorSpec]) -> str:
    """The name of the output that is scored; empty if there is none such."""
    for spec in outputs:
        if spec.datatype in SCORED and cascade.output in ("", spec.name):
            return spec.name
    return ""


def unsure(cascade: Cascade, values: NDArray[Any], samples: int) -> NDArray[np.bool_]:
    """Which samples are handed on.

    Args:
        cascade: how they are scored.
        values: the scored output, classes along its last axis.
        samples: along its first axis; 1 also for a model without batches.
    """
    return score(cascade, values, samples) < cascade.threshold


def score(cascade: Cascade, values: NDArray[Any], samples: int) -> NDArray[np.float64]:
    """The score of each sample, shape [samples]; see the module. A sample without values has the score 0."""
    classes = values.shape[-1] if values.ndim > 1 or (values.ndim == 1 and samples == 1) else 1
    if not values.size or values.size % (samples * classes):
        return np.zeros(samples)
    rows = values.reshape(samples, -1, classes).astype(np.float64)
    with np.errstate(all="ignore"):
        p = _softmax(rows) if cascade.scores == LOGITS else _both(rows)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1) / np.log(p.shape[-1])
        found = cascade.confidence_weight * p.max(-1) + cascade.entropy_weight * (1 - entropy)
        sound = np.isfinite(p).all(-1) & (p >= 0).all(-1) & (np.abs(p.sum(-1) - 1) <= SUM_TOLERANCE)
    least: NDArray[np.float64] = np.where(sound, found, 0.0).min(-1)
    return least


def _softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    if rows.shape[-1] == 1:
        rows = np.concatenate([rows, np.zeros_like(rows)], -1)
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return shares


def _both(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([rows, 1 - rows], -1) if rows.shape[-1] == 1 else rows


# Taking batches apart and putting them together.


def rows_of(arrays: Mapping[str, NDArray[Any]], names: Sequence[str], which: NDArray[np.bool_]) -> Arrays:
    """The inputs named, of the samples marked in `which`; of a request for one sample all there is."""
    if which.size == 1 or which.all():
        return {name: arrays[name] for name in names}
    return {name: np.ascontiguousarray(arrays[name][which]) for name in names}


def separable(arrays: Mapping[str, NDArray[Any]], samples: int) -> bool:
    """Whether samples lie along the first axis of every array."""
    return all(array.ndim and array.shape[0] == samples for array in arrays.values())


def merged(own: Arrays, answered: Mapping[str, NDArray[Any]], which: NDArray[np.bool_]) -> Arrays | None:
    """`own` with the samples marked in `which` from `answered`; None if the shapes do not fit."""
    if which.all():
        return {name: answered[name] for name in own}
    result = {}
    for name, array in own.items():
        given = answered[name]
        if given.shape[1:] != array.shape[1:] or given.shape[0] != which.sum() or given.dtype != array.dtype:
            return None
        result[name] = array.copy()
        result[name][which] = given
    return result


# Checking a declaration.


def check(first: Member, find: Callable[[str, str], Member | None]) -> None:
    """Follows a version's cascade to its end.

    Args:
        first: the version.
        find: the member for a model and a version (empty: the active one); None if it is not served.

    Raises:
        SluiceError: CASCADE_INVALID, CASCADE_INCOMPLETE (a model is not served yet).
    """
    member, way = first, [first.model]
    known = {(first.model, ""), (first.model, str(first.version))}
    while member.cascade is not None:
        model, version = target = member.cascade.target
        shown = member.cascade.to[: MAX_NAME_CHARACTERS + 20]
        if not model:
            raise _invalid(first, f"its option cascade_to is {shown!r}, not a model's name or name@version")
        if target in known:
            raise _invalid(first, f"its cascade is a circle: {' → '.join([*way, shown])}")
        if len(way) >= MAX_CASCADE_STEPS:
            raise _invalid(first, f"its cascade has over {MAX_CASCADE_STEPS} models: {' → '.join(way)} → …")
        found = find(model, version)
        if found is None:
            raise SluiceError(
                errors_pb2.CASCADE_INCOMPLETE,
                f"{member} hands on to {shown}, which this box does not serve",
                hint="roll that model out too; the activation is tried again",
                obj=str(first),
            )
        why = unfit(member, found)
        if why:
            raise _invalid(first, why)
        known |= {target, (model, str(found.version))}
        way.append(shown)
        member = found


def unfit(member: Member, target: Member) -> str:
    """Why `member` cannot hand samples on to `target`; empty if it can."""
    cascade = member.cascade
    assert cascade is not None
    if not scored_output(cascade, member.outputs):
        have = ", ".join(map(str, member.outputs))
        wanted = repr(cascade.output) if cascade.output else "one"
        return f"{member} has no output to score: {wanted} of {', '.join(SCORED)}; it has {have}"
    for what, needed, offered, by in (
        ("input", target.inputs, member.inputs, target),
        ("output", member.outputs, target.outputs, member),
    ):
        there = {spec.name: spec for spec in offered}
        for spec in needed:
            other = there.get(spec.name)
            if other is None:
                have = ", ".join(map(str, offered))
                return f"{by} has the {what} {spec}, and {target if by is member else member} has only {have}"
            if other.datatype != spec.datatype or not _shapes_fit(other.shape, spec.shape):
                return f"the {what} {spec} of {by} does not fit {other}"
    return ""


def _shapes_fit(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other))


def _invalid(first: Member, why: str) -> SluiceError:
    return SluiceError(
        errors_pb2.CASCADE_INVALID,
        f"{first} cannot be a cascade: {why}",
        hint="correct the variant's options, or the models, and publish again",
        obj=str(first),
    )
