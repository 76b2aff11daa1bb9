"""tflite-runtime: the predecessor of ai-edge-litert, for boxes that cannot take it.

It needs Python 3.11 at most, and NumPy 1: under NumPy 2 it is imported and then fails when it loads a
model, which the probe finds. It does not verify files, so `tflite_file` does.
"""

from __future__ import annotations

from runtimes.interpreter import InterpreterRuntime


class TfliteRuntime(InterpreterRuntime):
    """The last release is 2.14.0."""

    name = "tflite-runtime"
    distribution = "tflite-runtime"
    module = "tflite_runtime.interpreter"
    install = "pip install -c constraints-tflite-legacy.txt 'sluice[tflite-legacy]' in a venv of its own"
