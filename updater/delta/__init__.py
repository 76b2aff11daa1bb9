"""Deltas between files: a delta is a program that writes the target from the base, bit by bit.

`create` makes one, `apply` and the streaming `Applier` run it, `describe` shows what it does. The format is
specified in docs/delta-format.md.

    create:  encoder -> matching, plan -> candidates, program -> assembly -> streams, container
    apply:   applier -> container, journal, base -> block -> streams, instructions, program, tensors

Rules: bit-exact or refused; the decoder needs no model parser, computes only what every machine rounds
alike, and its memory is bounded by the block; whatever bytes arrive, a caller sees the target or a
SluiceError.
"""

from updater.delta.applier import Applier, Progress, apply
from updater.delta.container import FEATURES
from updater.delta.encoder import EFFORTS, DeltaSummary, EncodeOptions, create
from updater.delta.regions import Region, describe
from updater.limits import DecodeLimits

__all__ = [
    "EFFORTS",
    "FEATURES",
    "Applier",
    "DecodeLimits",
    "DeltaSummary",
    "EncodeOptions",
    "Progress",
    "Region",
    "apply",
    "create",
    "describe",
]
