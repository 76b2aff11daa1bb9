"""Addresses that follow from another: boxes and operators derive the same one."""

from __future__ import annotations


def next_port(address: str) -> str:
    """Where certificates are given unless told otherwise: the port after the control plane's.

    Args:
        address: host:port; anything without a port that has a next one is given back.
    """
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}" if port.isdigit() and int(port) < 65_535 else address
