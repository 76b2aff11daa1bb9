"""Log lines: one event a line on stderr, `time level event key=value …`, for grep and for machines.

A traceback follows its line, each of its lines indented.
"""

from __future__ import annotations

import logging
import sys
import time

ROOT = "sluice.control"


def configure(level: int = logging.INFO) -> None:
    """Sends this process's log to stderr. Called once by the process's entry."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(level)


def event(
    name: str, /, _level: int = logging.INFO, _error: BaseException | None = None, **fields: object
) -> None:
    """Logs one event, e.g. `event("delta_built", base=base, bytes=size)`.

    Args:
        name: what happened, in snake_case.
        _level: a level of `logging`.
        _error: an unexpected exception whose traceback belongs in the log.
        fields: what it happened to.
    """
    text = " ".join([name, *(f"{key}={_quote(value)}" for key, value in fields.items())])
    logging.getLogger(ROOT).log(_level, "%s", text, exc_info=_error)


def warning(name: str, /, _error: BaseException | None = None, **fields: object) -> None:
    """Logs an event that an operator should look at."""
    event(name, logging.WARNING, _error, **fields)


def _quote(value: object) -> str:
    text = str(value)
    if text and not any(character in text for character in ' "=\n\r\t'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{when}.{int(record.msecs):03d}Z {record.levelname.lower()} {record.getMessage()}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "\n" + "\n".join("    " + part for part in trace.splitlines())
        return line
