"""Who may call what: the decision, pure. The table itself stands in the contract, as the option `access` of
each method (proto/sluice/api/v1/access.proto).

In order: the caller's identity and trust domain, its role, the method's entry. What an entry does not name
is denied, and so is a method without one. What a device may see beyond calling is decided in ownership.py.
"""

from __future__ import annotations

import functools

from google.protobuf import descriptor_pool

from sluice.api.v1 import access_pb2, errors_pb2
from updater.errors import SluiceError
from updater.identity import Identity, Kind, Role

ROLES = {
    Role.VIEWER: access_pb2.ROLE_VIEWER,
    Role.PUBLISHER: access_pb2.ROLE_PUBLISHER,
    Role.OPERATOR: access_pb2.ROLE_OPERATOR,
    Role.ADMIN: access_pb2.ROLE_ADMIN,
}
_MOST_METHODS = 256  # remembered entries; the contract has a few dozen


@functools.lru_cache(_MOST_METHODS)
def access_of(method: str) -> access_pb2.Access | None:
    """A method's entry in the table; None without one.

    Args:
        method: its path as gRPC gives it: "/sluice.api.v1.Registry/GetModel".
    """
    name = method.lstrip("/").replace("/", ".")
    try:
        found = descriptor_pool.Default().FindMethodByName(name)  # type: ignore[no-untyped-call]
    except KeyError:
        return None
    options = found.GetOptions()
    return options.Extensions[access_pb2.access] if options.HasExtension(access_pb2.access) else None


def role_of(identity: Identity, granted: Role | None) -> Role | None:
    """An operator's role: the lower one of its certificate's and of the policy's entry, or the one there is.

    Args:
        identity: from the certificate.
        granted: the policy's entry for this operator, see operators.py.
    """
    if identity.kind is not Kind.OPERATOR:
        return None
    known = [role for role in (identity.role, granted) if role is not None]
    return min(known, key=lambda role: ROLES[role], default=None)


def may(
    identity: Identity | None, role: Role | None, method: str, *, trust_domain: str
) -> SluiceError | None:
    """None when the caller may call the method, else why not.

    Args:
        identity: of the caller; None without a certificate.
        role: as role_of gives it.
        method: its path.
        trust_domain: whose identities count here.
    """
    access = access_of(method)
    name = short_name(method)
    if access is None or access.local:
        return _denied(f"{name} is not for callers of the control plane", name)
    if access.anonymous:
        return None
    if identity is None:
        return SluiceError(
            errors_pb2.UNAUTHENTICATED,
            f"{name} needs a certificate, and the caller showed none",
            hint="enrol first; an operator gets a certificate from an admin",
            obj=name,
        )
    if identity.trust_domain != trust_domain:
        return SluiceError(
            errors_pb2.CERTIFICATE_INVALID,
            f"{identity} is not of the trust domain {trust_domain}",
            hint="the certificate was made for another fleet",
            obj=str(identity),
        )
    if identity.kind is Kind.DEVICE:
        return None if access.device else _denied(f"{name} is not for devices", name)
    if identity.kind is not Kind.OPERATOR:
        return _denied(f"{name} is for devices and operators, not for {identity}", name)
    if not access.role:
        return _denied(f"{name} is for devices only", name)
    if role is None:
        return _denied(
            f"{identity.name} has no role here",
            name,
            hint=f"an admin gives one: sluice operator role {identity.name} viewer",
        )
    if ROLES[role] < access.role:
        least = access_pb2.Role.Name(access.role).removeprefix("ROLE_").lower()
        return _denied(
            f"{name} needs the role {least}, and {identity.name} has the role {role.value}",
            name,
            hint=f"ask an admin or somebody with the role {least}",
        )
    return None


def short_name(method: str) -> str:
    """A method for people: Registry.GetModel."""
    service, _, name = method.lstrip("/").partition("/")
    return f"{service.rpartition('.')[2]}.{name}"


def _denied(message: str, obj: str, hint: str = "") -> SluiceError:
    return SluiceError(
        errors_pb2.PERMISSION_DENIED, message, hint=hint or "docs/security.md lists who may do what", obj=obj
    )
