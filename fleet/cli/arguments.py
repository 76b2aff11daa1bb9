"""Types of arguments: a model with a version or alias, key=value, a duration. Bad ones are usage errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from fleet.client import ControlClient
from sluice.api.v1 import registry_pb2
from updater.manifest import NAME_RULE, is_name

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_VERSION = (1 << 63) - 1

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # generic only since click 8.4
    _ParamType = click.ParamType


@dataclass(frozen=True)
class Ref:
    """A model and perhaps which version: by number, by alias, or (neither) the latest."""

    model: str
    version: int = 0
    alias: str = ""

    def __str__(self) -> str:
        if self.alias:
            return f"{self.model}:{self.alias}"
        return f"{self.model}@{self.version}" if self.version else self.model

    def get(self, client: ControlClient) -> registry_pb2.Version:
        """The version it names."""
        return client.get_version(self.model, self.version, alias=self.alias)


class _RefType(_ParamType):
    name = "NAME[@V|:ALIAS]"

    def convert(self, value: str | Ref, param: click.Parameter | None, ctx: click.Context | None) -> Ref:
        if isinstance(value, Ref):
            return value
        model, separator, which = re.fullmatch(r"([^@:]*)([@:]?)(.*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
        if not is_name(model):
            self.fail(f"{value!r} is not a model: a name has {NAME_RULE}", param, ctx)
        if separator == ":":
            if not is_name(which):
                self.fail(f"{value!r}: an alias has {NAME_RULE}", param, ctx)
            return Ref(model, alias=which)
        if separator == "@":
            return Ref(model, version=parse_version(self, which, value, param, ctx))
        return Ref(model)


class _VersionType(_ParamType):
    name = "VERSION"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        return parse_version(self, value.removeprefix("@"), value, param, ctx)


def parse_version(
    kind: _ParamType, text: str, given: str, param: click.Parameter | None, ctx: click.Context | None
) -> int:
    """A version number, 1 or more."""
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:20]) <= MAX_VERSION:
        kind.fail(f"{given!r} has no version number: versions are 1, 2, 3, …", param, ctx)
    return int(text)


class _NameType(_ParamType):
    name = "NAME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_name(value):
            self.fail(f"{value!r} is not a name: {NAME_RULE}", param, ctx)
        return value


class _PairType(_ParamType):
    name = "KEY=VALUE"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not key=value", param, ctx)
        return key, text


class _DurationType(_ParamType):
    name = "DURATION"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", value)
        seconds = int(match[1]) * _UNITS[match[2] or "s"] if match else 0
        if not 0 < seconds < 1 << 32:
            self.fail(f"{value!r} is not a duration: write 90s, 15m, 1h or 2d", param, ctx)
        return seconds


REF = _RefType()
VERSION = _VersionType()
NAME = _NameType()
PAIR = _PairType()
DURATION = _DurationType()


def unique(pairs: tuple[tuple[str, str], ...], option: str) -> dict[str, str]:
    """The pairs as a mapping; a key given twice is a usage error."""
    found: dict[str, str] = {}
    for key, value in pairs:
        if key in found:
            raise click.UsageError(f"{option} gives {key!r} twice")
        found[key] = value
    return found
