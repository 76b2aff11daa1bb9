"""Desired states that the online key signs: the two ends of a DesiredProof.

The bytes of a statement are signed once, sent as they are, and never parsed before their signature was
checked. The keys are those that the root names for timestamps; a prefix of its own keeps a signature of a
statement from ever passing for one of metadata. Which of the proven entries a box follows is decision.py's.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from google.protobuf.message import DecodeError
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Signature, Signer
from tuf.api.metadata import Root, Timestamp

from sluice.api.v1 import errors_pb2, sync_pb2
from updater.errors import SluiceError
from updater.limits import MAX_ROLE_KEYS, MAX_STATEMENT_BYTES

CONTEXT = b"sluice desired state 1\0"  # so that a signature of this can never pass for one of metadata


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


def _invalid(why: str, obj: str) -> SluiceError:
    return SluiceError(
        errors_pb2.METADATA_INVALID, why, hint="somebody replays or swaps messages; ask who runs it", obj=obj
    )
