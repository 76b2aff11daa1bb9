"""sd_notify: tells systemd READY, STATUS, WATCHDOG and STOPPING over the socket in $NOTIFY_SOCKET.

Without that variable (no systemd) every call does nothing. Protocol: sd_notify(3), one datagram of KEY=VALUE
lines to a unix socket whose name may be abstract.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(*lines: str) -> bool:
    """Sends the lines; True when systemd listens and took them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer:
            peer.settimeout(1.0)
            peer.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("cannot notify systemd: %s", error)
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to feed the watchdog: half of what systemd allows; None when it does not watch us."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    process = os.environ.get("WATCHDOG_PID", "")
    if not limit.isdigit() or (process.isdigit() and int(process) != os.getpid()):
        return None
    return int(limit) / 2e6
