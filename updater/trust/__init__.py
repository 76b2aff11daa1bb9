"""Trust: which model, and which device gets it now (The Update Framework, with python-tuf).

Two halves share these documents. Operators (fleet) make and change them with keys that never leave their
machines; devices (agent) verify them from the root that was pinned at installation. Files: `keys` (made,
sealed, opened), `documents` (reading, writing, signing), `roles` (root, targets, delegations and their
changes), `online` (snapshot and timestamp), `chain` (explains a whole repository), `client` (the device's
verified copy), `problems` (python-tuf's errors as ours). docs/security.md says what each part is for.
"""

from __future__ import annotations
