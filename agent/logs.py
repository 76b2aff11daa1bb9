"""Logs: one line an event on stderr, key=value, which journald keeps and grep finds."""

from __future__ import annotations

import logging
import sys
import time


class KeyValueFormatter(logging.Formatter):
    """`time=… level=… source=… message="…"`, one line whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += " | " + self.formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        text = message.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        where = f"level={record.levelname.lower()} source={record.name}"
        return f'time={stamp}.{int(record.msecs):03d}Z {where} message="{text}"'


def set_up(level: str) -> None:
    """Sends all records of at least `level` ("debug", "info", "warning") to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It tells of every signature that is not there; what follows from that is told by the agent.
    logging.getLogger("tuf").setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
