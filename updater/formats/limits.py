"""Every limit of the model readers, with its unit. Real files stay far below them; hostile ones are refused."""

from __future__ import annotations

# Elements along all dimensions of one tensor, and dimensions of one tensor.
MAX_ELEMENTS = 1 << 40
MAX_RANK = 64
