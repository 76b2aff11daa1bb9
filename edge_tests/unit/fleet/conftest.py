from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path / "control", "--disk-reserve-bytes", "0") as running:
        yield running


@pytest.fixture
def operator(control: ControlPlane) -> Iterator[Operator]:
    with Operator(control.address) as calls:
        yield calls
