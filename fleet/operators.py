"""The roles that admins gave to operators: a table, and its copy in memory, which every call asks.

A change is written first and counts from the next call on. No admin changes their own entry, so that one
always remains who can change the others'.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert as upsert

from fleet import tables
from fleet.authorisation import ROLES
from fleet.clock import now_us, to_timestamp
from fleet.database import Database
from fleet.limits import MAX_OPERATORS
from sluice.api.v1 import access_pb2, errors_pb2, operators_pb2
from updater.errors import SluiceError
from updater.identity import NAME_RULE, Identity, Kind, Role, is_name

_ROLE_OF_WIRE = {number: role for role, number in ROLES.items()}


class Operators:
    """The roles of one control plane's operators. `load` comes first."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._roles: dict[str, Role] = {}

    async def load(self) -> None:
        """Reads the table."""
        self._roles = await self._database.read(_roles)

    def granted(self, identity: Identity) -> Role | None:
        """The role that an operator's entry gives; None without one."""
        return self._roles.get(identity.name) if identity.kind is Kind.OPERATOR else None

    async def set_role(self, caller: Identity | None, name: str, wanted: access_pb2.Role.ValueType) -> None:
        """Sets an operator's entry, or removes it when `wanted` is ROLE_UNSPECIFIED.

        Args:
            caller: whose call it is; None where nobody is asked who they are.
            name: the operator's.
            wanted: the role.

        Raises SluiceError(REQUEST_INVALID | PERMISSION_DENIED | LIMIT_EXCEEDED).
        """
        if not is_name(name):
            raise SluiceError(
                errors_pb2.REQUEST_INVALID,
                f"not an operator's name: {name[:80]!r}; it must be {NAME_RULE}",
                obj="name",
            )
        if wanted and wanted not in _ROLE_OF_WIRE:
            raise SluiceError(errors_pb2.REQUEST_INVALID, f"there is no role {wanted}", obj="role")
        if caller is not None and caller.kind is Kind.OPERATOR and caller.name == name:
            raise SluiceError(
                errors_pb2.PERMISSION_DENIED,
                f"{name} may not change their own role",
                hint="ask another admin, so that one always remains",
                obj=name,
            )
        role = _ROLE_OF_WIRE.get(wanted)
        await self._database.write(lambda c: _save(c, name, role))
        if role is None:
            self._roles.pop(name, None)
        else:
            self._roles[name] = role

    async def entries(self) -> list[operators_pb2.OperatorRole]:
        """Every entry, by name."""

        def find(connection: Connection) -> list[operators_pb2.OperatorRole]:
            rows = connection.execute(select(tables.operators).order_by(tables.operators.c.name)).all()
            return [
                operators_pb2.OperatorRole(
                    name=row.name, role=ROLES[Role(row.role)], change_time=to_timestamp(row.changed_us)
                )
                for row in rows
            ]

        return await self._database.read(find)


def _roles(connection: Connection) -> dict[str, Role]:
    return {row.name: Role(row.role) for row in connection.execute(select(tables.operators))}


def _save(connection: Connection, name: str, role: Role | None) -> None:
    columns = tables.operators.c
    if role is None:
        connection.execute(delete(tables.operators).where(columns.name == name))
        return
    statement = upsert(tables.operators).values(name=name, role=role.value, changed_us=now_us())
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name"],
            set_={"role": statement.excluded.role, "changed_us": statement.excluded.changed_us},
        )
    )
    count = connection.execute(select(func.count()).select_from(tables.operators)).scalar_one()
    if count > MAX_OPERATORS:
        raise SluiceError(
            errors_pb2.LIMIT_EXCEEDED,
            f"{MAX_OPERATORS} operators have entries; no more are taken",
            hint="remove some: sluice operator role NAME --remove",
            obj=name,
        )
