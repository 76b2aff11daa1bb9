"""Who somebody is: the SPIFFE identities of devices, operators and the control plane.

An identity is a URI in a certificate's subject alternative name (SPIFFE ID, section 2 of the SPIFFE-ID
standard): spiffe://<trust domain>/device/<id>, …/operator/<name> or …/operator/<name>/<role>, and
…/control/<name>. Pure: certificates are read elsewhere.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

MAX_URI_CHARACTERS = 512  # a quarter of what SPIFFE allows; our longest is below 300
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,128}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 of a-z A-Z 0-9 . - _, a letter or digit first"


class Kind(enum.Enum):
    """What an identity stands for; the value is the first segment of its path."""

    DEVICE = "device"
    OPERATOR = "operator"
    CONTROL = "control"


class Role(enum.Enum):
    """What an operator may do; each may do what those before it may."""

    VIEWER = "viewer"
    PUBLISHER = "publisher"
    OPERATOR = "operator"
    ADMIN = "admin"


@dataclass(frozen=True)
class Identity:
    """One identity.

    Attributes:
        trust_domain: of the fleet; lower-case letters, digits, dots, dashes, underscores.
        kind: device, operator or control plane.
        name: a device's id, an operator's name; as DeviceId in devices.proto.
        role: of an operator whose certificate names it; None where policy decides.
    """

    trust_domain: str
    kind: Kind
    name: str
    role: Role | None = None

    def __post_init__(self) -> None:
        if not _TRUST_DOMAIN.fullmatch(self.trust_domain):
            raise _malformed(self.trust_domain, "a trust domain has 1 to 128 of a-z 0-9 . - _")
        if not _NAME.fullmatch(self.name):
            raise _malformed(self.name, f"a name has {NAME_RULE}")
        if self.role is not None and self.kind is not Kind.OPERATOR:
            raise _malformed(self.name, "only operators have roles")

    @property
    def uri(self) -> str:
        """The SPIFFE ID."""
        path = f"spiffe://{self.trust_domain}/{self.kind.value}/{self.name}"
        return f"{path}/{self.role.value}" if self.role is not None else path

    def __str__(self) -> str:
        return self.uri


def is_name(text: str) -> bool:
    """Whether an identity may have this name."""
    return _NAME.fullmatch(text) is not None


def parse(uri: str) -> Identity:
    """The identity that a URI names. Raises SluiceError(CERTIFICATE_INVALID): nothing is normalised."""
    scheme = "spiffe://"
    if len(uri) > MAX_URI_CHARACTERS or not uri.startswith(scheme):
        raise _malformed(uri, f"an identity is spiffe://<trust domain>/{_forms()}")
    domain, *path = uri[len(scheme) :].split("/")
    kinds = {kind.value: kind for kind in Kind}
    roles = {role.value: role for role in Role}
    if len(path) == 2 and path[0] in kinds:
        return Identity(domain, kinds[path[0]], path[1])
    if len(path) == 3 and path[0] == Kind.OPERATOR.value and path[2] in roles:
        return Identity(domain, Kind.OPERATOR, path[1], roles[path[2]])
    raise _malformed(uri, f"its path is not {_forms()}")


def _forms() -> str:
    return "device/<id>, operator/<name>, operator/<name>/<role> or control/<name>"


def _malformed(what: str, why: str) -> SluiceError:
    return SluiceError(
        errors_pb2.CERTIFICATE_INVALID,
        f"not an identity: {what[:MAX_URI_CHARACTERS]!r}: {why}",
        hint="the certificate was made for another system, or by a CA that is set up differently",
        obj=what[:MAX_URI_CHARACTERS],
    )
