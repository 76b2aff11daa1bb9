"""How spans are put in order, and which quantisation parameters fit a shape."""

from __future__ import annotations

from updater.formats import Quantisation, TensorSpan
from updater.formats.layout import arrange, byte_length, quantisation


def span(name: str, offset: int, length: int, parameters: Quantisation | None = None) -> TensorSpan:
    return TensorSpan(name, "uint8", (length,), offset, length, parameters)


def test_spans_are_sorted_and_empty_ones_left_out() -> None:
    assert arrange([span("b", 8, 4), span("none", 2, 0), span("a", 0, 8)]) == (
        span("a", 0, 8),
        span("b", 8, 4),
    )


def test_shared_bytes_give_one_span_with_the_quantisation_of_either() -> None:
    parameters = Quantisation((0.5,), (0,), None)
    assert arrange([span("a", 0, 8), span("b", 0, 8, parameters)]) == (span("a", 0, 8, parameters),)
    assert arrange([span("a", 0, 8, parameters), span("b", 0, 8)]) == (span("a", 0, 8, parameters),)


def test_of_overlapping_spans_the_first_stays() -> None:
    assert arrange([span("c", 6, 8), span("a", 0, 8), span("b", 0, 4)]) == (span("a", 0, 8),)


def test_parameters_that_do_not_fit_are_left_out() -> None:
    assert quantisation([0.5], [], (2, 3), 1) == Quantisation((0.5,), (0,), None)
    assert quantisation([1, 2, 3], [7], (2, 3), -1) == Quantisation((1, 2, 3), (7, 7, 7), 1)
    assert quantisation([1, 2], [0, 0, 0], (2, 3), 0) is None
    assert quantisation([1, 2], [], (2, 3), 1) is None
    assert quantisation([1, 2], [], (2, 3), 5) is None
    assert quantisation([float("inf")], [], (2,), 0) is None
    assert quantisation([-1.0], [], (2,), 0) is None


def test_small_elements_are_packed() -> None:
    lengths = [byte_length(dtype, 5) for dtype in ("int2", "uint4", "float6_e2m3fn", "int8", "complex128")]
    assert lengths == [2, 3, 4, 5, 80]
