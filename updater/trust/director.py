"""Which device gets it now: desired states that the online key signs, and what a device does with them.

`sign_desired` and `read_desired` are the two ends of a DesiredProof: bytes signed once, sent as they are,
never parsed before their signature was checked. `decide` is the rule for one entry of a desired state that
was proven, a pure function of what the box holds and what fresh metadata names:

1. The version that the box runs, or the one it would revert to: always. Going back to what it committed
   itself needs nobody.
2. Anything else must be named by signed targets with exactly this manifest.
3. Up, or down to the floor of the version that it runs: yes. The floor is in the manifest that operators
   signed.
4. Further down: only where the signed target says that devices at this version may (`sluice trust allow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from google.protobuf.message import DecodeError
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Signature, Signer
from tuf.api.metadata import Root, TargetFile, Timestamp

from sluice.api.v1 import errors_pb2, sync_pb2
from updater.digests import PREFIX
from updater.errors import SluiceError
from updater.limits import MAX_ROLE_KEYS, MAX_STATEMENT_BYTES
from updater.trust.roles import allowed_from

CONTEXT = b"sluice desired state 1\0"  # so that a signature of this can never pass for one of metadata


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


def sign_desired(
    device_id: str, desired: sync_pb2.DesiredState, signer: Signer, now: datetime, life_s: float
) -> sync_pb2.DesiredProof:
    """The proof of a desired state for one device.

    Args:
        device_id: whom it is for.
        desired: without a proof.
        signer: the online key.
        now: the control plane's clock.
        life_s: seconds in which the device may take it up.
    """
    statement = sync_pb2.DesiredStatement(device_id=device_id, desired=desired)
    statement.issue_time.FromDatetime(now)
    statement.expire_time.FromDatetime(now + timedelta(seconds=life_s))
    data = statement.SerializeToString(deterministic=True)
    made = signer.sign(CONTEXT + data)
    signature = sync_pb2.StatementSignature(key_id=made.keyid, signature=bytes.fromhex(made.signature))
    return sync_pb2.DesiredProof(statement=data, signatures=[signature])


def read_desired(
    proof: sync_pb2.DesiredProof, root: Root, device_id: str, now: datetime
) -> sync_pb2.DesiredStatement:
    """The statement in a proof, if it counts for this device now.

    Args:
        proof: as received.
        root: the newest trusted root.
        device_id: of this box.
        now: the time to hold expiry against.

    Raises SluiceError(SIGNATURE_INVALID | METADATA_EXPIRED | METADATA_INVALID | LIMIT_EXCEEDED).
    """
    if len(proof.statement) > MAX_STATEMENT_BYTES or len(proof.signatures) > MAX_ROLE_KEYS:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"a desired state of {len(proof.statement)} bytes with {len(proof.signatures)} signatures"
            " is refused",
            obj=device_id,
        )
    role = root.roles[Timestamp.type]
    good = {
        item.key_id
        for item in proof.signatures
        if item.key_id in role.keyids and _verifies(root, item, CONTEXT + proof.statement)
    }
    if len(good) < role.threshold:
        raise SluiceError(
            errors_pb2.SIGNATURE_INVALID,
            f"the desired state has {len(good)} good signatures of the online key;"
            f" {role.threshold} are needed",
            hint="is this the control plane of this fleet? `sluice trust verify` shows what counts",
            obj=device_id,
        )
    statement = sync_pb2.DesiredStatement()
    try:
        statement.ParseFromString(proof.statement)
    except DecodeError as error:
        raise _invalid("the signed desired state cannot be read", device_id) from error
    if statement.device_id != device_id:
        raise _invalid(
            f"the desired state is for {statement.device_id[:80]!r}, not for this device", device_id
        )
    expires = statement.expire_time.ToDatetime(timezone.utc)
    if expires <= now:
        raise SluiceError(
            errors_pb2.METADATA_EXPIRED,
            f"the desired state was good until {expires:%Y-%m-%d %H:%M} UTC; here it is {now:%Y-%m-%d %H:%M}",
            hint="check this machine's clock; the control plane signs anew with each connection",
            obj=device_id,
        )
    return statement


def _verifies(root: Root, item: sync_pb2.StatementSignature, data: bytes) -> bool:
    key = root.keys.get(item.key_id)
    if key is None:
        return False
    try:
        key.verify_signature(Signature(item.key_id, item.signature.hex()), data)
    except (UnverifiedSignatureError, VerificationError):
        return False
    return True


def decide(held: Held, model: str, version: int, manifest_digest: str, named: TargetFile | None) -> None:
    """Accepts a version that is desired, or says why not; see the module's rules.

    Args:
        held: what the box holds of the model.
        model: its name.
        version: that is desired.
        manifest_digest: as the desired state gives it.
        named: what fresh metadata names for the version; None for nothing.

    Raises SluiceError(VERSION_NOT_SIGNED | VERSION_BELOW_FLOOR).
    """
    if manifest_digest in (held.active_digest, held.previous_digest):
        return
    name = f"{model}@{version}"
    if named is None or f"{PREFIX}{named.hashes.get('sha256')}" != manifest_digest:
        what = "no version of this number" if named is None else "other content under this number"
        raise SluiceError(
            errors_pb2.VERSION_NOT_SIGNED,
            f"{name} is desired, but the operators signed {what}",
            hint="push it with `sluice model push`; if nobody did, ask who runs the control plane",
            obj=name,
        )
    if version >= held.floor or held.active <= allowed_from(named):
        return
    raise SluiceError(
        errors_pb2.VERSION_BELOW_FLOOR,
        f"{name} is below {held.floor}, the floor of version {held.active} that this box runs",
        hint=f"if it must be, an operator allows it: `sluice trust allow {name} --from {held.active}`",
        obj=name,
    )


def _invalid(why: str, obj: str) -> SluiceError:
    return SluiceError(
        errors_pb2.METADATA_INVALID, why, hint="somebody replays or swaps messages; ask who runs it", obj=obj
    )
