"""Every limit of this room, with its unit. Formats and the delta have their own sections.

A limit guards memory, disk or time against input that may come from anyone; raising one is safe only as far
as the smallest supported box allows.
"""

from __future__ import annotations

# Manifests.
MAX_MANIFEST_BYTES = 1 << 20
MAX_VARIANTS = 32
MAX_FILES_PER_VARIANT = 256
MAX_ANNOTATIONS = 64  # entries, in each map
MAX_TEXT_CHARACTERS = 1024  # of any free text in a manifest
MAX_FILE_BYTES = 16 << 30  # of one file of a version
