"""What an operator may choose about one control plane, with defaults that suit one machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleet.limits import CERTIFICATE_LIFE_S
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

GIB = 1 << 30


@dataclass(frozen=True)
class ControlConfig:
    """Settings of `fleet.server.run`.

    Attributes:
        data: directory for the database, the files and the delta cache; created when absent.
        listen: "host:port" or "[ipv6]:port"; port 0 takes any free one. The bound address is written to
            `data/address`.
        disk_reserve_bytes: kept free on the file system of `data`; uploads and builds stop short of it.
        delta_cache_bytes: full copies and deltas held; the least recently used go first.
        builders: deltas computed at once, each in a process of its own.
        heartbeat_interval_ms: a device with a stream reports at least this often.
        poll_interval_ms: a device without a stream polls this often.
        enrol_listen: where certificates are asked for, without one; empty: the same host, the next port.
        certificate_life_s: of what the embedded authority issues.
        encoder: "module:function" that writes deltas, called as `updater.delta.create`.
    """

    data: Path
    listen: str = "127.0.0.1:8470"
    disk_reserve_bytes: int = GIB // 4
    delta_cache_bytes: int = 20 * GIB
    builders: int = 1
    heartbeat_interval_ms: int = 30_000
    poll_interval_ms: int = 60_000
    enrol_listen: str = ""
    certificate_life_s: float = CERTIFICATE_LIFE_S
    encoder: str = "updater.delta:create"

    def check(self) -> None:
        """Raises SluiceError(CONFIG_INVALID) naming the setting that is out of range."""
        least = {
            "disk_reserve_bytes": 0,
            "delta_cache_bytes": 1,
            "builders": 1,
            "heartbeat_interval_ms": 100,
            "poll_interval_ms": 100,
            "certificate_life_s": 2,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise SluiceError(
                    errors_pb2.CONFIG_INVALID, f"{name} is {value}; the least is {bound}", obj=name
                )
        host_and_port(self.listen)
        host_and_port(self.enrolment())

    def enrolment(self) -> str:
        """Where certificates are asked for."""
        host, port = host_and_port(self.listen)
        return self.enrol_listen or f"{host}:{port + 1 if port else 0}"


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of an address to listen on. Raises SluiceError(CONFIG_INVALID)."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise SluiceError(
            errors_pb2.CONFIG_INVALID,
            f"the address to listen on is not host:port: {address!r}",
            hint="for example 127.0.0.1:8470 or [::1]:8470",
            obj="listen",
        )
    return host, int(port)
