"""Imported before gRPC, which reads its settings once: its own lines on stderr are switched off.

What they say reaches people as the SluiceError of the call that failed. GRPC_VERBOSITY=ERROR (or INFO, DEBUG)
in the environment brings them back.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
