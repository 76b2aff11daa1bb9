"""External delegates: a library of the test's own, compiled here, used or passed over by real workers."""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from agent import placement
from agent.config import load
from agent.worker_spec import WorkerSpec
from edge_tests.harness import models, serving
from runtimes.interface import ExternalDelegate
from runtimes.survey import survey
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

SOURCE = serving.ROOT / "edge_tests" / "harness" / "taking_delegate.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    if struct.calcsize("P") != 8:
        pytest.skip("the structures of the test's delegate are those of 64-bit machines")
    path = tmp_path_factory.mktemp("delegate") / "libtaking.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, SOURCE], check=True)
    return path


def taking(library: Path, **options: str) -> ExternalDelegate:
    return ExternalDelegate("taking", str(library), tuple(options.items()))


def start(path: Path, delegate: ExternalDelegate, *accelerators: str) -> serving.Worker:
    spec = WorkerSpec("tiny", 1, path, "tflite", accelerators=accelerators, delegates=(delegate,))
    return placement.start(spec, 60)


def test_a_delegate_that_takes_an_operator_is_used(library: Path, tmp_path: Path) -> None:
    path = models.tiny_tflite(tmp_path / "m.tflite")
    plain = serving.start_worker(path)
    worker = start(path, taking(library, take="one"), "taking")
    try:
        assert (worker.accelerator, plain.accelerator) == ("taking", "cpu")
        for rows in (1, 3):
            x = models.samples(rows)
            np.testing.assert_allclose(
                worker.infer(x, 20)["y"], plain.infer(x, 20)["y"], rtol=1e-4, atol=1e-5
            )
    finally:
        worker.close(0)
        plain.close(0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "taking takes none of the operators"),
        ({"take": "one", "wrong": "1"}, "answered [[8.5, 10.5]] on a tiny model"),
        ({"device": "none"}, "cannot load the delegate"),
        ({"crash": "1"}, "tiny@1 is not loaded on taking"),
    ],
    ids=["takes-nothing", "wrong", "refuses", "crashes"],
)
def test_one_that_does_not_work_is_passed_over_with_the_reason(
    library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, str], why: str
) -> None:
    path = models.tiny_tflite(tmp_path / "m.tflite")
    with caplog.at_level(logging.WARNING):
        worker = start(path, taking(library, **options), "taking", "cpu")
    try:
        assert worker.accelerator == "cpu"
        assert why in caplog.text
        assert worker.infer(models.samples(2), 20)
    finally:
        worker.close(0)


def test_a_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    path, gone = models.tiny_tflite(tmp_path / "m.tflite"), tmp_path / "libgone.so"
    with pytest.raises(SluiceError, match=r"taking: litert cannot load the delegate .*libgone\.so") as caught:
        start(path, taking(gone), "taking")
    assert caught.value.reason == errors_pb2.RUNTIME_UNAVAILABLE
    with pytest.raises(SluiceError, match=r"no accelerator 'other'.*it has cpu"):
        start(path, taking(gone), "other")  # what the box has no delegate for cannot be named


def test_the_box_says_which_of_its_delegates_work(library: Path) -> None:
    good = taking(library, take="one")
    bad = ExternalDelegate("absent", "/nowhere/libabsent.so")
    crashing = ExternalDelegate("crashing", str(library), (("crash", "1"),))
    probes = {probe.runtime: probe for probe in survey(delegates=(good, bad, crashing))}
    assert probes["litert"].accelerators == ("taking", "cpu")
    absent, crashed = probes["litert"].passed_over
    assert absent.startswith("absent is not used: absent: litert cannot load the delegate /nowhere/")
    assert "SIGABRT" in crashed
    assert "taking" not in probes["onnxruntime"].accelerators


def test_delegates_come_from_the_boxs_configuration(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    text = """
        [control]
        address = "c:1"
        [inference.delegates.edgetpu]
        library = "/usr/lib/libedgetpu.so.1"
        options = { device = "usb" }
    """
    path.write_text(text)
    usb = (("device", "usb"),)
    assert load(path).delegates == (ExternalDelegate("edgetpu", "/usr/lib/libedgetpu.so.1", usb),)
    for old, new, says in (
        ('"/usr/lib/libedgetpu.so.1"', '"libedgetpu.so.1"', "edgetpu.library must be an absolute path"),
        ("delegates.edgetpu", "delegates.cpu", "must be named by"),
        ("delegates.edgetpu", "delegates.Edge-TPU", "must be named by"),
        ("library", "path", "must be a table of library"),
        ('"usb"', "1", "options.device must be text"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(SluiceError, match=r"inference\.delegates") as caught:
            load(path)
        assert says in caught.value.message
