"""Enrolment, renewal and revocation against a real control plane: who is let in, and who is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_tests.harness import trust
from edge_tests.harness.applicant import Applicant, let_in
from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Device, Operator, failing
from fleet import ca
from sluice.api.v1 import (
    devices_pb2,
    errors_pb2,
    identity_pb2,
    registry_pb2,
    registry_pb2_grpc,
    sync_pb2,
    sync_pb2_grpc,
)
from updater.certificates import certificates, new_key, to_pem
from updater.credentials import Credentials
from updater.identity import Identity, Kind, Role
from updater.keyfile import FileKey
from updater.wire import from_rpc_error

ACCEPTED = identity_pb2.IDENTITY_STATE_ACCEPTED


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One for all tests of this module: each uses names of its own."""
    with ControlPlane(tmp_path_factory.mktemp("identities") / "control") as running:
        yield running


@pytest.fixture
def operator(control: ControlPlane) -> Iterator[Operator]:
    with Operator(control.address) as calls:
        yield calls


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").replace("]", "")[:60].rstrip("-_.")


@pytest.fixture
def box(control: ControlPlane, name: str) -> Iterator[Applicant]:
    with Applicant(control.enrolment_address, Identity(trust.TRUST_DOMAIN, Kind.DEVICE, name)) as applicant:
        yield applicant


def token(operator: Operator, **fields: Any) -> str:
    request = identity_pb2.CreateTokenRequest(**{"kind": "device", **fields})
    return operator.identities.CreateToken(request, timeout=20).token


def find(operator: Operator, name: str, **fields: Any) -> identity_pb2.Identity | None:
    request = identity_pb2.ListIdentitiesRequest(page_size=1000, **fields)
    listed = operator.identities.ListIdentities(request, timeout=20).identities
    return next((entry for entry in listed if entry.name == name), None)


def again(control: ControlPlane, box: Applicant, key: FileKey | None = None) -> Applicant:
    """Another box that says it is this one."""
    return Applicant(control.enrolment_address, box.identity, key)


def test_a_token_lets_a_box_in(control: ControlPlane, operator: Operator, box: Applicant) -> None:
    held = box.enrol(token=token(operator, labels={"site": "harbour"}))
    assert held.check(trust.now()) == box.identity
    assert let_in(control.address, held) is None
    with Device(control.address, box.identity.name):
        pass
    shown = operator.devices.GetDevice(_get(box.identity.name), timeout=20)
    assert dict(shown.labels) == {"site": "harbour"}
    found = find(operator, box.identity.name)
    assert found is not None
    assert (found.state, found.fingerprint) == (ACCEPTED, box.fingerprint)


def _get(name: str) -> Any:
    return devices_pb2.GetDeviceRequest(id=name)


def test_a_token_is_good_once(control: ControlPlane, operator: Operator, box: Applicant) -> None:
    slip = token(operator)
    box.enrol(token=slip)
    box.enrol(token=slip)  # the same box with the same key: its answer was lost
    other = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, box.identity.name + "-2")
    with Applicant(control.enrolment_address, other) as second:
        assert failing(lambda: second.enrol(token=slip)).reason == errors_pb2.TOKEN_INVALID
    with again(control, box) as clone:
        assert failing(lambda: clone.enrol(token=slip)).reason == errors_pb2.TOKEN_INVALID


def test_an_expired_token_is_refused(operator: Operator, box: Applicant) -> None:
    slip = token(operator, life_s=1)
    time.sleep(1.1)
    failure = failing(lambda: box.enrol(token=slip))
    assert failure.reason == errors_pb2.TOKEN_INVALID
    assert "expired" in failure.message


def test_a_guessed_token_is_refused_and_leaves_nothing(operator: Operator, box: Applicant) -> None:
    slip = token(operator)
    for guess in (slip[:-1], slip + "A", slip[:-1] + ("A" if slip[-1] != "A" else "B"), "slt_", "x" * 9000):
        assert failing(lambda guess=guess: box.enrol(token=guess)).reason == errors_pb2.TOKEN_INVALID
    assert find(operator, box.identity.name) is None


def test_tokens_are_kept_as_hashes(control: ControlPlane, operator: Operator) -> None:
    slip = token(operator)
    assert all(
        slip.encode() not in path.read_bytes()
        for path in control.data.rglob("*")
        if path.is_file() and path.name.startswith("control.db")
    )


@pytest.mark.parametrize(
    "purpose",
    [
        {"name": "another-box"},
        {"kind": "operator", "name": "ana", "role": "admin"},
        {"labels": {"site": "mountain"}},
    ],
)
def test_a_token_for_something_else_is_refused(
    operator: Operator, box: Applicant, purpose: dict[str, Any]
) -> None:
    slip = token(operator, **purpose)
    failure = failing(lambda: box.enrol(token=slip, labels={"site": "harbour"}))
    assert failure.reason == errors_pb2.TOKEN_INVALID


def test_an_operator_gets_the_role_of_the_token(control: ControlPlane, operator: Operator) -> None:
    slip = token(operator, kind="operator", name="ben", role="publisher")
    asks = [Identity(trust.TRUST_DOMAIN, Kind.OPERATOR, "ben", role) for role in (Role.ADMIN, Role.PUBLISHER)]
    with Applicant(control.enrolment_address, asks[0]) as greedy:
        assert failing(lambda: greedy.enrol(token=slip)).reason == errors_pb2.TOKEN_INVALID
    with Applicant(control.enrolment_address, asks[1]) as honest:
        assert honest.enrol(token=slip).check(trust.now()) == asks[1]
        honest.identity = asks[0]
        assert failing(honest.renew).reason == errors_pb2.ENROLMENT_REFUSED


def test_approval_is_by_fingerprint(operator: Operator, box: Applicant) -> None:
    waiting = failing(box.enrol)
    assert waiting.reason == errors_pb2.ENROLMENT_PENDING
    assert box.fingerprint in waiting.message
    found = find(operator, box.identity.name, attention_only=True)
    assert found is not None
    assert found.fingerprint == box.fingerprint
    wrong = identity_pb2.ApproveRequest(kind="device", name=box.identity.name, fingerprint="0000-1111")
    assert failing(lambda: operator.identities.Approve(wrong)).reason == errors_pb2.IDENTITY_CONFLICT
    assert failing(box.enrol).reason == errors_pb2.ENROLMENT_PENDING
    right = identity_pb2.ApproveRequest(kind="device", name=box.identity.name, fingerprint=box.fingerprint)
    assert operator.identities.Approve(right).state == ACCEPTED
    assert box.enrol().check(trust.now()) == box.identity
    assert find(operator, box.identity.name, attention_only=True) is None


def test_a_rejected_box_stays_out_until_a_token_names_it(operator: Operator, box: Applicant) -> None:
    failing(box.enrol)
    operator.identities.Reject(identity_pb2.RejectRequest(kind="device", name=box.identity.name))
    assert failing(box.enrol).reason == errors_pb2.ENROLMENT_REFUSED
    assert failing(box.renew).reason == errors_pb2.ENROLMENT_REFUSED
    assert failing(lambda: box.enrol(token=token(operator))).reason == errors_pb2.ENROLMENT_REFUSED
    assert box.enrol(token=token(operator, name=box.identity.name)).check(trust.now()) == box.identity


def test_a_re_imaged_box_is_noticed_and_let_in_by_its_fingerprint(
    control: ControlPlane, operator: Operator, box: Applicant
) -> None:
    old = box.enrol(token=token(operator))
    with again(control, box) as new:
        failure = failing(new.enrol)
        assert failure.reason == errors_pb2.IDENTITY_CONFLICT
        assert new.fingerprint in failure.message
        # A token for anybody does not hand a name on that another box holds.
        assert failing(lambda: new.enrol(token=token(operator))).reason == errors_pb2.IDENTITY_CONFLICT
        found = find(operator, box.identity.name, attention_only=True)
        assert found is not None
        assert (found.fingerprint, found.conflict_fingerprint) == (box.fingerprint, new.fingerprint)
        approve = identity_pb2.ApproveRequest(
            kind="device", name=box.identity.name, fingerprint=new.fingerprint
        )
        time.sleep(1)  # dates of certificates are whole seconds
        operator.identities.Approve(approve)
        held = new.enrol()
        assert let_in(control.address, held) is None
        assert _reason(control, old) == errors_pb2.CERTIFICATE_REVOKED
        assert failing(box.renew).reason == errors_pb2.SIGNATURE_INVALID


def test_the_other_key_of_a_conflict_can_be_rejected(
    control: ControlPlane, operator: Operator, box: Applicant
) -> None:
    held = box.enrol(token=token(operator))
    with again(control, box) as thief:
        failing(thief.enrol)
        operator.identities.Reject(identity_pb2.RejectRequest(kind="device", name=box.identity.name))
        assert failing(thief.enrol).reason == errors_pb2.ENROLMENT_REFUSED
    assert find(operator, box.identity.name, attention_only=True) is None
    assert let_in(control.address, held) is None


def test_a_key_in_two_boxes_is_noticed(control: ControlPlane, operator: Operator, box: Applicant) -> None:
    box.enrol(token=token(operator))
    with again(control, box, box.key) as clone:
        clone.counter = box.counter
        box.renew()
        clone.renew()  # once may be an answer that was lost
        assert find(operator, box.identity.name, attention_only=True) is None
        box.renew()
    found = find(operator, box.identity.name, attention_only=True)
    assert found is not None
    assert "two places" in found.notice


def test_a_restored_disk_is_noticed(operator: Operator, box: Applicant) -> None:
    box.enrol(token=token(operator))
    for _ in range(3):
        box.renew()
    box.renew(counter=1)
    found = find(operator, box.identity.name, attention_only=True)
    assert found is not None
    assert "old copy" in found.notice


def test_a_lost_answer_is_no_cause_for_notice(operator: Operator, box: Applicant) -> None:
    box.enrol(token=token(operator))
    for _ in range(3):
        before = box.counter
        box.renew()
        box.counter = before  # the box never saw the answer
        box.renew()
        box.renew()
    assert find(operator, box.identity.name, attention_only=True) is None


def test_a_box_away_for_years_renews(operator: Operator, box: Applicant) -> None:
    box.enrol(token=token(operator))
    # Nothing of a renewal looks at the certificate that was held before.
    assert box.renew().check(trust.now()) == box.identity


def test_who_never_enrolled_cannot_renew(box: Applicant) -> None:
    assert failing(box.renew).reason == errors_pb2.UNAUTHENTICATED


def test_a_replayed_request_is_refused(operator: Operator, box: Applicant) -> None:
    first = box.enrolment(token=token(operator))
    box.enrol(first)
    failure = failing(lambda: box.enrol(first))
    assert failure.reason == errors_pb2.SIGNATURE_INVALID
    assert "replay" in failure.message
    renewal = box.renewal()
    box.renew(renewal)
    assert failing(lambda: box.renew(renewal)).reason == errors_pb2.SIGNATURE_INVALID


def test_every_changed_field_of_a_request_refuses_it(operator: Operator, box: Applicant) -> None:
    box.enrol(token=token(operator))
    other = FileKey(new_key())
    for field in ("nonce", "request", "signature"):
        for position in (0, 9, -1):
            renewal = box.renewal()
            value = bytearray(getattr(renewal, field))
            value[position] ^= 1
            setattr(renewal, field, bytes(value))
            reason = failing(lambda renewal=renewal: box.renew(renewal)).reason
            assert reason in (errors_pb2.SIGNATURE_INVALID, errors_pb2.CERTIFICATE_INVALID), (field, position)
    renewal = box.renewal()
    renewal.counter += 1
    assert failing(lambda: box.renew(renewal)).reason == errors_pb2.SIGNATURE_INVALID
    for name, value in (("enrolment_key", other.public), ("enrolment_key", b"x"), ("signature", b"")):
        enrolment = box.enrolment()
        setattr(enrolment, name, value)
        reason = failing(lambda enrolment=enrolment: box.enrol(enrolment)).reason
        assert reason in (errors_pb2.SIGNATURE_INVALID, errors_pb2.CERTIFICATE_INVALID)
    # What was signed for an enrolment is no renewal, and the other way round.
    enrolment, renewal = box.enrolment(), box.renewal()
    swapped = identity_pb2.RenewRequest(
        nonce=enrolment.nonce, request=enrolment.request, signature=enrolment.signature, counter=box.counter
    )
    assert failing(lambda: box.renew(swapped)).reason == errors_pb2.SIGNATURE_INVALID
    assert box.renew(renewal).check(trust.now()) == box.identity


@pytest.mark.parametrize(
    "identity",
    [
        Identity("elsewhere.test", Kind.DEVICE, "box"),
        Identity(trust.TRUST_DOMAIN, Kind.CONTROL, "main"),
    ],
)
def test_some_identities_are_given_to_nobody(
    control: ControlPlane, operator: Operator, identity: Identity
) -> None:
    with Applicant(control.enrolment_address, identity) as applicant:
        failure = failing(lambda: applicant.enrol(token=token(operator)))
        assert failure.reason == errors_pb2.CERTIFICATE_INVALID


def _reason(control: ControlPlane, held: Credentials) -> int:
    error = let_in(control.address, held)
    assert error is not None, "these credentials were let in"
    return from_rpc_error(error, "testing", control.address).reason


def test_revocation_acts_at_once_on_calls_and_open_streams(
    control: ControlPlane, operator: Operator, box: Applicant
) -> None:
    held = box.enrol(token=token(operator))
    with held.channel(control.address) as channel:
        hello = sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id=box.identity.name))
        call = sync_pb2_grpc.SyncStub(channel).Connect(chain([hello], _until(20)), timeout=60)
        assert next(call).HasField("welcome")
        assert next(call).HasField("desired")
        began = time.monotonic()
        operator.identities.Revoke(identity_pb2.RevokeRequest(kind="device", name=box.identity.name))
        failure = failing(lambda: list(call))
        assert time.monotonic() - began < 5
        assert failure.reason == errors_pb2.CERTIFICATE_REVOKED
        # The connection stands still; the next call on it is refused as well.
        listing = registry_pb2_grpc.RegistryStub(channel).ListModels
        failure = failing(lambda: listing(registry_pb2.ListModelsRequest(), timeout=20))
        assert failure.reason == errors_pb2.CERTIFICATE_REVOKED
    assert _reason(control, held) == errors_pb2.CERTIFICATE_REVOKED
    assert failing(box.renew).reason == errors_pb2.ENROLMENT_REFUSED
    time.sleep(1)  # dates of certificates are whole seconds
    back = box.enrol(token=token(operator, name=box.identity.name))
    assert let_in(control.address, back) is None


def test_revocation_outlives_a_restart(tmp_path: Path) -> None:
    with ControlPlane(tmp_path / "control") as control:
        held = trust.device("box-that-was-never-seen")
        assert let_in(control.address, held) is None
        with Operator(control.address) as operator:
            request = identity_pb2.RevokeRequest(kind="device", name="box-that-was-never-seen")
            operator.identities.Revoke(request)
        control.restart()
        assert _reason(control, held) == errors_pb2.CERTIFICATE_REVOKED


STRANGERS = {
    "expired": lambda _: trust.issue(_BOX, age_s=2 * 86_400),
    "not yet valid": lambda _: trust.issue(_BOX, age_s=-2 * 86_400),
    "of another authority": lambda path: trust.issue(
        _BOX, by=ca.create(path / "ca", trust.TRUST_DOMAIN, trust.now())
    ),
    "none": lambda _: Credentials(trust.issuer().bundle),
    "alone": lambda _: _alone(),
}
_BOX = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "box")


def _alone() -> Credentials:
    """A good certificate without what leads to the root."""
    held = trust.issue(_BOX)
    leaf = certificates(held.chain)[0]
    return Credentials(held.bundle, to_pem([leaf]), held.key)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_do_not_get_through_the_handshake(
    control: ControlPlane, stranger: str, tmp_path: Path
) -> None:
    error = let_in(control.address, STRANGERS[stranger](tmp_path))
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_another_trust_domain_is_refused(control: ControlPlane) -> None:
    # As an authority that serves two fleets would issue it: the chain holds, the domain does not.
    elsewhere = replace(trust.issuer(), trust_domain="elsewhere.test")
    held = trust.issue(Identity("elsewhere.test", Kind.OPERATOR, "ana", Role.ADMIN), by=elsewhere)
    assert _reason(control, held) == errors_pb2.CERTIFICATE_INVALID


def test_who_does_not_trust_the_control_plane_is_told(control: ControlPlane, tmp_path: Path) -> None:
    other = ca.create(tmp_path / "ca", trust.TRUST_DOMAIN, trust.now())
    error = let_in(control.address, replace(trust.operator(), bundle=other.bundle))
    assert error is not None
    failure = from_rpc_error(error, "testing", control.address)
    assert failure.reason == errors_pb2.CONTROL_UNREACHABLE
    assert "no trust" in failure.message
    assert "trust bundle" in failure.hint


def test_nobody_speaks_in_plain_text(control: ControlPlane) -> None:
    for address in (control.address, control.enrolment_address):
        with grpc.insecure_channel(address) as channel:
            call = registry_pb2_grpc.RegistryStub(channel).ListModels
            with pytest.raises(grpc.RpcError) as caught:
                call(registry_pb2.ListModelsRequest(), timeout=5)
            assert caught.value.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )


def test_the_enrolment_port_serves_nothing_else(control: ControlPlane) -> None:
    with trust.operator().anonymous().channel(control.enrolment_address) as channel:
        call = registry_pb2_grpc.RegistryStub(channel).ListModels
        with pytest.raises(grpc.RpcError) as caught:
            call(registry_pb2.ListModelsRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_device_cannot_pretend_to_be_the_control_plane() -> None:
    held = trust.device("box")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    secure = grpc.ssl_server_credentials([(held.key, held.chain)], held.bundle, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", secure)
    server.start()
    try:
        error = let_in(f"127.0.0.1:{port}", trust.operator())
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop(0).wait(5)


def test_a_stream_ends_with_its_certificate(control: ControlPlane) -> None:
    held = trust.issue(Identity(trust.TRUST_DOMAIN, Kind.DEVICE, "brief"), life_s=3)
    with held.channel(control.address) as channel:
        hello = sync_pb2.ConnectRequest(hello=sync_pb2.Hello(device_id="brief"))
        call = sync_pb2_grpc.SyncStub(channel).Connect(chain([hello], _until(6)), timeout=60)
        assert failing(lambda: list(call)).reason == errors_pb2.CERTIFICATE_EXPIRED


def _until(seconds: float) -> Iterator[sync_pb2.ConnectRequest]:
    for _ in range(int(seconds * 2)):
        time.sleep(0.5)
        yield sync_pb2.ConnectRequest(reported=sync_pb2.ReportedState())
