"""The numbers inside the conformance models, from which the tests compute what a runtime must answer."""

from __future__ import annotations

import numpy as np

WEIGHTS = (np.arange(12, dtype=np.float32) - 5).reshape(4, 3)
BIAS = np.array([0.5, -1.0, 2.0], np.float32)

SCALE = 0.05  # of the codes model
CODE_OFFSET = 20
