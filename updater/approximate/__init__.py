"""Approximate updates: a target that is nearly the wanted one and whose exact delta is much smaller.

    layers:    two files -> the layers that may be approximated; and new values -> the approximate file
    methods:   what is kept of each layer's change, as integer codes and steps (sign, topk, threshold,
    lowrank)
    rounding:  the words that a change becomes, so that they code small
    figures:   how far a layer is from the wanted one

Rules: the approximate target is a file like any other, written once by whoever publishes it and reproduced
bit by bit by whoever applies its delta; what is not approximated is the target's byte for byte; the same
input gives the same file. The measures and methods are explained, with their sources, in docs/approximate.md.
"""

from updater.approximate.figures import LayerFigures, Tally, explained, tally
from updater.approximate.layers import Layer, find_layers, write_file
from updater.approximate.methods import METHODS, Method, Update, make_method
from updater.approximate.rounding import EXACT, ROUNDINGS, Rounding, realise

__all__ = [
    "EXACT",
    "METHODS",
    "ROUNDINGS",
    "Layer",
    "LayerFigures",
    "Method",
    "Rounding",
    "Tally",
    "Update",
    "explained",
    "find_layers",
    "make_method",
    "realise",
    "tally",
    "write_file",
]
