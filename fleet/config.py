"""What an operator may choose about one control plane, with defaults that suit one machine."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

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
        encoder: "module:function" that writes deltas, called as `updater.delta.create`.
    """

    data: Path
    listen: str = "127.0.0.1:8470"
    disk_reserve_bytes: int = GIB // 4
    delta_cache_bytes: int = 20 * GIB
    builders: int = 1
    heartbeat_interval_ms: int = 30_000
    poll_interval_ms: int = 60_000
    encoder: str = "updater.delta:create"

    def check(self) -> None:
        """Raises SluiceError(CONFIG_INVALID) naming the setting that is out of range."""
        least = {
            "disk_reserve_bytes": 0,
            "delta_cache_bytes": 1,
            "builders": 1,
            "heartbeat_interval_ms": 100,
            "poll_interval_ms": 100,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise SluiceError(
                    errors_pb2.CONFIG_INVALID, f"{name} is {value}; the least is {bound}", obj=name
                )
        self.host_and_port()

    def host_and_port(self) -> tuple[str, int]:
        """The parts of `listen`. Raises SluiceError(CONFIG_INVALID)."""
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise SluiceError(
                errors_pb2.CONFIG_INVALID,
                f"the address to listen on is not host:port: {self.listen!r}",
                hint="for example 127.0.0.1:8470 or [::1]:8470",
                obj="listen",
            )
        return host, int(port)

    def is_loopback(self) -> bool:
        """Whether only this machine can reach the control plane."""
        host = self.host_and_port()[0].strip("[]")
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False
