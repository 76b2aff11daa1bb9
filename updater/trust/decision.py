"""Which version a box may install: one pure decision, for one entry of a proven desired state.

1. The version that the box runs, or the one it would revert to: always. Going back to what it committed
   itself needs nobody.
2. Anything else must be named by fresh signed metadata with exactly this manifest.
3. Up, or down to the floor of the version that it runs: yes. The floor is in the manifest that operators
   signed.
4. Further down: only where the signed metadata lets devices at this version go there (`sluice trust allow`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


@dataclass(frozen=True)
class Held:
    """What a box holds of one model.

    Attributes:
        active: the version that it runs; 0 for none.
        active_digest: of that version's manifest.
        floor: of that version; 0 where none runs.
        previous_digest: of the manifest that it would revert to; empty for none.
    """

    active: int = 0
    active_digest: str = ""
    floor: int = 0
    previous_digest: str = ""

    def owns(self, manifest_digest: str) -> bool:
        """Whether a version is the box's own, to run or to go back to."""
        return manifest_digest in (self.active_digest, self.previous_digest) and bool(manifest_digest)


@dataclass(frozen=True)
class Named:
    """What signed metadata says of a version.

    Attributes:
        digest: of its manifest.
        allowed_from: devices at this version or a lower one may go down to it, whatever their floor; 0: none.
    """

    digest: str
    allowed_from: int = 0


def decide(held: Held, model: str, version: int, manifest_digest: str, named: Named | None) -> None:
    """Accepts a version that is desired, or says why not; see the module's rules.

    Args:
        held: what the box holds of the model.
        model: its name.
        version: that is desired.
        manifest_digest: as the desired state gives it.
        named: what fresh metadata says of the version; None where it says nothing.

    Raises SluiceError(VERSION_NOT_SIGNED | VERSION_BELOW_FLOOR).
    """
    if held.owns(manifest_digest):
        return
    name = f"{model}@{version}"
    if named is None or named.digest != manifest_digest:
        what = "no version of this number" if named is None else "other content under this number"
        raise SluiceError(
            errors_pb2.VERSION_NOT_SIGNED,
            f"{name} is desired, but the operators signed {what}",
            hint="push it with `sluice model push`; if nobody did, ask who runs the control plane",
            obj=name,
        )
    if version >= held.floor or held.active <= named.allowed_from:
        return
    raise SluiceError(
        errors_pb2.VERSION_BELOW_FLOOR,
        f"{name} is below {held.floor}, the floor of version {held.active} that this box runs",
        hint=f"if it must be, an operator allows it: `sluice trust allow {name} --from {held.active}`",
        obj=name,
    )
