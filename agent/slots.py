"""Which version a box serves, as values: the slots of one model and the moves between them.

A model has three slots. *Active* is what the box serves, and after a power cut serves again. *Previous* is
what it goes back to. *Staged* is what is being installed; it never serves. Every function here takes slots
and returns slots; state.py writes one result in one transaction, which is the only commit point.

Rules, whatever the order of moves:
- Once active is set it is never empty again: the box serves the old version or the new one, never neither.
- Previous is never the active version, and staged never replaces active except by `commit`.
- A revert leaves nothing to revert to, so that two broken versions cannot send a box to and fro.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError


@dataclass(frozen=True)
class Installed:
    """A version as one slot holds it.

    Attributes:
        version: its number.
        manifest_digest: of its manifest, which lies in the store.
        variant: the variant chosen for this box.
        runtime: the runtime chosen for that variant.
    """

    version: int
    manifest_digest: str
    variant: str
    runtime: str


@dataclass(frozen=True)
class Slots:
    """The slots of one model.

    Attributes:
        model: its name.
        active: what the box serves; None before the first installation.
        previous: what a revert goes back to.
        staged: what is being installed.
        soaking: active was committed, but has not yet proven itself for the soak time.
        pinned: an administrator on the box reverted to active and holds it until the desired version
            changes.
    """

    model: str
    active: Installed | None = None
    previous: Installed | None = None
    staged: Installed | None = None
    soaking: bool = False
    pinned: bool = False

    @property
    def held(self) -> tuple[Installed, ...]:
        """What the slots need on disk."""
        return tuple(item for item in (self.active, self.previous, self.staged) if item is not None)


def stage(slots: Slots, version: Installed) -> Slots:
    """Begins the installation of a version; an unfinished one before it is dropped."""
    return replace(slots, staged=version)


def unstage(slots: Slots) -> Slots:
    """Gives up the installation; what serves is untouched."""
    return replace(slots, staged=None)


def commit(slots: Slots) -> Slots:
    """Makes the staged version active: the one commit point of an activation.

    A version installed again over itself (a repair) keeps its previous one.
    """
    if slots.staged is None:
        raise SluiceError(
            errors_pb2.INTERNAL, f"{slots.model} has no staged version to commit", obj=slots.model
        )
    repair = slots.active is not None and slots.active.manifest_digest == slots.staged.manifest_digest
    previous = slots.previous if repair else slots.active
    if previous is not None and previous.manifest_digest == slots.staged.manifest_digest:
        previous = None
    return replace(slots, active=slots.staged, previous=previous, staged=None, soaking=True, pinned=False)


def soaked(slots: Slots) -> Slots:
    """The active version has proven itself."""
    return replace(slots, soaking=False)


def revert(slots: Slots, *, pin: bool) -> Slots:
    """Goes back to the previous version.

    Args:
        slots: before.
        pin: an administrator asked: stay until the desired version changes.

    Raises SluiceError(MODEL_NOT_SERVING | NO_PREVIOUS_VERSION).
    """
    if slots.active is None:
        raise SluiceError(
            errors_pb2.MODEL_NOT_SERVING,
            f"this box has no active version of {slots.model}",
            hint="its first version is not installed yet: `sluice-agent status` shows how far it is",
            obj=slots.model,
        )
    if slots.previous is None:
        raise SluiceError(
            errors_pb2.NO_PREVIOUS_VERSION,
            f"{slots.model} runs version {slots.active.version} and this box keeps no version before it",
            hint="roll out the version you want from the control plane",
            obj=slots.model,
        )
    return replace(slots, active=slots.previous, previous=None, soaking=False, pinned=pin)


def unpin(slots: Slots) -> Slots:
    """The desired version changed: the administrator's hold ends."""
    return replace(slots, pinned=False)
