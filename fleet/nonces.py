"""Nonces that are good once, for a minute, and cost no memory until they are used.

A nonce says when it was made and carries a MAC under a key of this process; so anybody may ask for any
number. Used ones are remembered until their minute is over. After a restart older ones are refused: callers
ask again.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict

from fleet.limits import MAX_NONCES, NONCE_LIFE_S
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

_RANDOM_BYTES = 16
_TIME_BYTES = 8
_MAC_BYTES = 16


class Nonces:
    """The nonces of one process. Times are any clock's seconds that only move forward."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._used: OrderedDict[bytes, float] = OrderedDict()  # nonce: until when it is remembered

    def make(self, now_s: float) -> bytes:
        """A new nonce."""
        body = int(now_s * 1000).to_bytes(_TIME_BYTES, "big") + secrets.token_bytes(_RANDOM_BYTES)
        return body + self._mac(body)

    def use(self, nonce: bytes, now_s: float) -> None:
        """Uses a nonce up. Raises SluiceError(SIGNATURE_INVALID | LIMIT_EXCEEDED)."""
        body, mac = nonce[:-_MAC_BYTES], nonce[-_MAC_BYTES:]
        if len(nonce) != _TIME_BYTES + _RANDOM_BYTES + _MAC_BYTES or not hmac.compare_digest(
            mac, self._mac(body)
        ):
            raise _refused("the nonce was not made here, or before a restart")
        until_s = int.from_bytes(body[:_TIME_BYTES], "big") / 1000 + NONCE_LIFE_S
        if now_s > until_s:
            raise _refused("the nonce is older than a minute")
        while self._used and next(iter(self._used.values())) < now_s:
            self._used.popitem(last=False)
        if nonce in self._used:
            raise _refused("the nonce was used before: the request is a replay")
        if len(self._used) >= MAX_NONCES:
            raise SluiceError(errors_pb2.LIMIT_EXCEEDED, f"more than {MAX_NONCES} requests in a minute")
        # Remembered by when it is used, so that the order of the dictionary is the order of forgetting.
        self._used[nonce] = now_s + NONCE_LIFE_S

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_MAC_BYTES]


def _refused(message: str) -> SluiceError:
    return SluiceError(errors_pb2.SIGNATURE_INVALID, message, hint="ask for a new challenge and sign that")
