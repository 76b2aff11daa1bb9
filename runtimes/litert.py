"""LiteRT (PyPI `ai-edge-litert`): TensorFlow Lite's interpreter as Google ships it now."""

from __future__ import annotations

from runtimes.interpreter import InterpreterRuntime


class LiteRt(InterpreterRuntime):
    """Runs on NumPy 1 and 2."""

    name = "litert"
    distribution = "ai-edge-litert"
    module = "ai_edge_litert.interpreter"
    install = "pip install 'sluice[tflite]'"
