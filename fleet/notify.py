"""Tells systemd that the service is ready, alive or stopping (sd_notify(3)); does nothing elsewhere."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Sends one state such as "READY=1"; returns False when no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # a name in the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall(state.encode())
        except OSError:  # the manager went away: nobody to tell, and no reason to stop serving
            return False
    return True


def watchdog_interval_s() -> float | None:
    """Half of the time within which systemd wants WATCHDOG=1, or None when it does not watch this process."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2e6
