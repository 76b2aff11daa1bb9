"""Identities: what a URI says, and that nothing else passes for one."""

from __future__ import annotations

import pytest

from updater.errors import SluiceError
from updater.identity import Identity, Kind, Role, parse


@pytest.mark.parametrize(
    ("uri", "identity"),
    [
        ("spiffe://example.org/device/box-1", Identity("example.org", Kind.DEVICE, "box-1")),
        ("spiffe://example.org/operator/ada", Identity("example.org", Kind.OPERATOR, "ada")),
        ("spiffe://a/operator/ada/admin", Identity("a", Kind.OPERATOR, "ada", Role.ADMIN)),
        ("spiffe://a_b/control/main", Identity("a_b", Kind.CONTROL, "main")),
    ],
)
def test_round_trip(uri: str, identity: Identity) -> None:
    assert parse(uri) == identity
    assert identity.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "spiffe://example.org",
        "spiffe://example.org/device",
        "spiffe://example.org/device/",
        "spiffe://example.org/device/box-1/",
        "spiffe://example.org/device/box-1/admin",
        "spiffe://example.org/device/../operator/ada",
        "spiffe://example.org//device/box-1",
        "spiffe://example.org/device/box%2d1",
        "spiffe://example.org/device/box-1?x",
        "spiffe://example.org/device/box-1#x",
        "spiffe://example.org/device/box-1\n",
        "spiffe://Example.org/device/box-1",
        "spiffe://user@example.org/device/box-1",
        "spiffe://example.org:443/device/box-1",
        "SPIFFE://example.org/device/box-1",
        "https://example.org/device/box-1",
        "spiffe://example.org/operator/ada/root",
        "spiffe://example.org/machine/box-1",
        "spiffe://example.org/device/" + "x" * 65,
        "spiffe://" + "x" * 129 + "/device/box-1",
        "spiffe://example.org/device/" + "x" * 600,
    ],
)
def test_refused(uri: str) -> None:
    with pytest.raises(SluiceError) as caught:
        parse(uri)
    assert caught.value.code == "CERTIFICATE_INVALID"
    assert len(caught.value.message) < 1000


def test_only_operators_have_roles() -> None:
    with pytest.raises(SluiceError):
        Identity("example.org", Kind.DEVICE, "box-1", Role.ADMIN)
