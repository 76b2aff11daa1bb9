"""Readers that find tensors in the bytes of ONNX, TFLite and safetensors files; any other file is opaque."""

from updater.formats.reader import detect_format, external_spans, read_model
from updater.formats.span import ELEMENT_BITS, ModelFile, Quantisation, TensorSpan

__all__ = [
    "ELEMENT_BITS",
    "ModelFile",
    "Quantisation",
    "TensorSpan",
    "detect_format",
    "external_spans",
    "read_model",
]
