"""Each bit of a request for a certificate: with one flipped there is none, or what was signed is what it was.

The bits are those of the whole message on the wire, so also of its tags and lengths. Some of them in the
tests, all with SLUICE_EXHAUSTIVE=1 (`make soak`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from edge_tests.harness import trust
from fleet import tokens
from fleet.authentication import Callers
from fleet.authority import Authority
from fleet.clock import SECOND, now_us
from fleet.database import Database
from fleet.enrolment import Enrolments
from fleet.tokens import Purpose
from sluice.api.v1 import identity_pb2
from updater.certificates import make_request, new_key
from updater.enrolment import ENROL, RENEW, signed_bytes
from updater.errors import SluiceError
from updater.identity import Identity, Kind
from updater.keyfile import FileKey

EXHAUSTIVE = os.environ.get("SLUICE_EXHAUSTIVE") == "1"
STEP = 1 if EXHAUSTIVE else 29  # bits; it shares no factor with a byte's, so every bit of a byte has its turn
LIFE_S = 3600.0


class Desk:
    """Where requests are decided: database, authority and rules of a control plane, without the wire."""

    def __init__(self, directory: Path) -> None:
        trust.install(directory)
        self.database = Database(directory / "control.db")
        authority = Authority(directory / "ca", LIFE_S)
        self.enrolments = Enrolments(self.database, authority, Callers(authority.trust_domain))
        self.key = FileKey(new_key())
        self.number = 0
        self.token = ""
        self.counter = 0

    async def begin(self) -> None:
        """A box of a name that was never heard, with a token that was never used."""
        self.number += 1
        self.identity = Identity(trust.TRUST_DOMAIN, Kind.DEVICE, f"box-{self.number}")
        purpose, now = Purpose(Kind.DEVICE, self.identity.name, "", {}), now_us()
        self.token = await self.database.write(lambda c: tokens.create(c, purpose, now + 3600 * SECOND, now))

    def enrolment(self) -> identity_pb2.EnrolRequest:
        request, nonce = make_request(new_key(), self.identity), self.enrolments.challenge().nonce
        signature = self.key.sign(signed_bytes(ENROL, nonce, request, self.key.public))
        return identity_pb2.EnrolRequest(
            nonce=nonce,
            request=request,
            enrolment_key=self.key.public,
            signature=signature,
            token=self.token,
            labels={"site": "mill"},
        )

    def renewal(self) -> identity_pb2.RenewRequest:
        request, nonce = make_request(new_key(), self.identity), self.enrolments.challenge().nonce
        signed = signed_bytes(RENEW, nonce, request, self.key.public, self.counter)
        return identity_pb2.RenewRequest(
            nonce=nonce, request=request, signature=self.key.sign(signed), counter=self.counter
        )


async def flip_all(
    make: Callable[[], Any],
    ask: Callable[[Any], Awaitable[identity_pb2.CertificateResponse]],
    signed: Callable[[Any], tuple[Any, ...]],
    accepted_one: Callable[[identity_pb2.CertificateResponse], Awaitable[None]],
) -> tuple[int, int]:
    """How many bits were flipped, and with how many of them there was a certificate nevertheless."""
    flips = accepted = 0
    longest = len(make().SerializeToString()) * 8
    for at in range(0, longest, STEP):
        good = make()  # a nonce is good once, so each is a request of its own
        data = bytearray(good.SerializeToString())
        if at // 8 >= len(data):
            continue  # signatures are a byte longer or shorter
        data[at // 8] ^= 1 << at % 8
        flips += 1
        try:
            changed = type(good).FromString(bytes(data))
            answer = await ask(changed)
        except (DecodeError, SluiceError):
            continue
        accepted += 1
        assert signed(changed) == signed(good), (at, changed)
        await accepted_one(answer)
    return flips, accepted


@pytest.mark.parametrize("what", ["enrol", "renew"])
def test_flipping_any_bit_of_a_request_gives_no_other_certificate(what: str, tmp_path: Path) -> None:
    async def run() -> tuple[int, int]:
        desk = Desk(tmp_path)
        await desk.begin()
        if what == "enrol":

            async def again(_: identity_pb2.CertificateResponse) -> None:
                await desk.begin()

            found = await flip_all(
                desk.enrolment,
                desk.enrolments.enrol,
                lambda r: (r.nonce, r.request, r.enrolment_key, r.signature, r.token),
                again,
            )
            await desk.enrolments.enrol(desk.enrolment())  # the unharmed one is accepted
            return found
        desk.counter = (await desk.enrolments.enrol(desk.enrolment())).counter

        async def renewed(answer: identity_pb2.CertificateResponse) -> None:
            desk.counter = answer.counter

        found = await flip_all(
            desk.renewal,
            desk.enrolments.renew,
            lambda r: (r.nonce, r.request, r.signature, r.counter),
            renewed,
        )
        await renewed(await desk.enrolments.renew(desk.renewal()))  # the unharmed one is accepted
        return found

    flips, accepted = asyncio.run(run())
    assert flips > 2500 / STEP
    assert accepted < flips / 10
    if EXHAUSTIVE:
        print(f"{what}: {flips} flips, {accepted} accepted with the same signed part")
