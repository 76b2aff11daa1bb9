"""Probes in processes of their own, with libraries that misbehave: real packages on the child's path."""

from __future__ import annotations

import pytest

from runtimes import registry
from runtimes.survey import survey


def by_name(timeout_s: float = 60.0):
    return {probe.runtime: probe for probe in survey(timeout_s)}


def test_the_same_as_in_this_process():
    assert survey() == registry.probe_all()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", ["SIGILL"]),
        ("import os; os._exit(3)", ["status 3"]),
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            ["libcudart", "sluice[onnx]"],
        ),
        ("raise RuntimeError('compiled for another NumPy')", ["another NumPy"]),
        ("import sys; print('{', flush=True); import os; os._exit(0)", ["no result"]),
        ("__version__ = '1.0'", ["onnxruntime"]),
    ],
    ids=["crash", "exit", "import-error", "other-error", "no-result", "empty-package"],
)
def test_a_library_that_misbehaves_is_named(tmp_path, monkeypatch, code, words):
    (tmp_path / "onnxruntime.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probes = by_name()
    assert not probes["onnxruntime"].usable
    assert probes["onnxruntime"].accelerators == ()
    for word in words:
        assert word in f"{probes['onnxruntime'].error} ({probes['onnxruntime'].hint})"
    assert probes["litert"].usable


def test_a_library_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "did not end within 3 s" in by_name(timeout_s=3.0)["onnxruntime"].error


def test_a_wrong_answer_is_no_runtime(tmp_path, monkeypatch):
    """A build that computes nonsense imports, loads and runs."""
    (tmp_path / "ai_edge_litert").mkdir()
    (tmp_path / "ai_edge_litert" / "__init__.py").write_text("")
    (tmp_path / "ai_edge_litert" / "interpreter.py").write_text(WRONG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = by_name()["litert"]
    assert not probe.usable
    assert "answered [[0.0, 0.0]]" in probe.error
    assert "[[7.5, 9.5]]" in probe.error


WRONG = """
import numpy as np

class Interpreter:
    def __init__(self, model_path, num_threads): pass
    def allocate_tensors(self): pass
    def _details(self, name, index):
        return [{"name": name, "index": index, "shape": np.array([1, 2]), "shape_signature": np.array([1, 2]),
                 "dtype": np.float32}]
    def get_input_details(self): return self._details("x", 0)
    def get_output_details(self): return self._details("y", 1)
    def get_signature_list(self): return {}
    def set_tensor(self, index, value): pass
    def invoke(self): pass
    def get_tensor(self, index): return np.zeros((1, 2), np.float32)
"""
