"""What to do after a failed attempt: pure decisions, by cause.

Each reason belongs to one `Cause`, each cause has a backoff and a limit. A version that can never work on
this box is final at once and left alone until the desired state changes; a network that is away is waited for
without end; everything between is tried a bounded number of times. Waits use full jitter: uniformly random
from zero to an exponentially growing bound, so that a fleet does not come back in step.

Method: "Exponential Backoff And Jitter", M. Brooker, AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from agent.update_limits import HINT_JITTER, HINT_MOST_S
from sluice.api.v1 import errors_pb2
from sluice.api.v1.errors_pb2 import ErrorReason


class Cause(enum.Enum):
    """Kinds of failures that ask for different answers."""

    FINAL = "final"  # the version cannot work here
    NETWORK = "network"  # the control plane is away, not ready, or does not let the box in
    DAMAGED = "damaged"  # the delta's bytes are wrong: fetch again, then ask for a full copy
    BASE = "base"  # the base on disk is wrong: drop it and plan again
    DISK = "disk"  # no room
    TRUST = "trust"  # signed metadata is missing, old or broken: whoever signs it has to mend it
    KILLED = "killed"  # killed while it loaded: there may be more memory later
    MEMBER = "member"  # another model must be there first
    MEMORY = "memory"  # no room for two workers: another model may end, or memory be freed
    OTHER = "other"  # unexpected: a few tries


@dataclass(frozen=True)
class Policy:
    """Waits and limit of one cause.

    Attributes:
        first_s: upper bound of the wait after the first failure, seconds.
        most_s: upper bound of any wait, seconds.
        attempts: failures after which the version is given up; 0 for never.
    """

    first_s: float
    most_s: float
    attempts: int


POLICIES = {
    Cause.FINAL: Policy(0, 0, 1),
    Cause.NETWORK: Policy(1, 300, 0),
    Cause.DAMAGED: Policy(0.5, 60, 6),
    Cause.BASE: Policy(0.5, 60, 6),
    Cause.DISK: Policy(5, 900, 0),
    Cause.TRUST: Policy(5, 900, 0),
    Cause.KILLED: Policy(5, 900, 8),
    Cause.MEMBER: Policy(2, 300, 12),
    Cause.MEMORY: Policy(5, 900, 0),
    Cause.OTHER: Policy(1, 300, 6),
}

_CAUSES: dict[int, Cause] = {
    **dict.fromkeys(
        (
            errors_pb2.MODEL_FILE_TRUNCATED,
            errors_pb2.MODEL_FILE_INVALID,
            errors_pb2.MANIFEST_INVALID,
            errors_pb2.MODEL_UNKNOWN,
            errors_pb2.VERSION_UNKNOWN,
            errors_pb2.VERSION_RETIRED,
            errors_pb2.NO_COMPATIBLE_VARIANT,
            errors_pb2.RUNTIME_UNAVAILABLE,
            errors_pb2.MODEL_LOAD_FAILED,
            errors_pb2.GOLDEN_MISMATCH,
            errors_pb2.WARM_UP_FAILED,
            errors_pb2.VERSION_NOT_SIGNED,
            errors_pb2.VERSION_BELOW_FLOOR,
            errors_pb2.CASCADE_INVALID,
            errors_pb2.SHADOW_MISMATCH,
            errors_pb2.SOAK_FAILED,
        ),
        Cause.FINAL,
    ),
    **dict.fromkeys(
        (
            errors_pb2.CONTROL_UNREACHABLE,
            errors_pb2.DELTA_NOT_READY,
            # The certificate is being renewed, or an operator has to look: both may take days.
            errors_pb2.UNAUTHENTICATED,
            errors_pb2.CERTIFICATE_EXPIRED,
            errors_pb2.CERTIFICATE_REVOKED,
            errors_pb2.CERTIFICATE_INVALID,
            errors_pb2.ENROLMENT_PENDING,
            errors_pb2.ENROLMENT_REFUSED,
            # Asked too often, or not let in for now: neither says anything about the version.
            errors_pb2.LIMIT_EXCEEDED,
            errors_pb2.PERMISSION_DENIED,
        ),
        Cause.NETWORK,
    ),
    **dict.fromkeys(
        (
            errors_pb2.DELTA_INVALID,
            errors_pb2.DELTA_TRUNCATED,
            errors_pb2.DELTA_CORRUPT,
            errors_pb2.DELTA_TARGET_MISMATCH,
            errors_pb2.DELTA_UNSUPPORTED,
            errors_pb2.DELTA_LIMIT_EXCEEDED,
            errors_pb2.FILE_DIGEST_MISMATCH,
        ),
        Cause.DAMAGED,
    ),
    **dict.fromkeys((errors_pb2.DELTA_WRONG_BASE, errors_pb2.STORE_CORRUPT), Cause.BASE),
    errors_pb2.DISK_FULL: Cause.DISK,
    **dict.fromkeys(
        (
            errors_pb2.SIGNATURE_INVALID,
            errors_pb2.METADATA_EXPIRED,
            errors_pb2.METADATA_ROLLED_BACK,
            errors_pb2.METADATA_INVALID,
            errors_pb2.CONFIG_INVALID,  # the pinned root cannot be read
        ),
        Cause.TRUST,
    ),
    errors_pb2.OUT_OF_MEMORY: Cause.KILLED,
    errors_pb2.CASCADE_INCOMPLETE: Cause.MEMBER,
    errors_pb2.MEMORY_SHORT: Cause.MEMORY,
}


def cause_of(reason: ErrorReason.ValueType) -> Cause:
    """The cause behind a reason; reasons not listed are unexpected."""
    return _CAUSES.get(reason, Cause.OTHER)


@dataclass(frozen=True)
class Decision:
    """What follows from a failure.

    Attributes:
        final: do not try this version again until the desired state changes.
        wait_s: before the next attempt, seconds; 0 when final.
        discard_partial: bytes received so far cannot be trusted.
    """

    final: bool
    wait_s: float
    discard_partial: bool


def decide(
    reason: ErrorReason.ValueType, failures: int, random_value: float, hint_s: float = 0.0
) -> Decision:
    """The answer to a failure.

    Args:
        reason: why the attempt failed.
        failures: failures of this cause in a row, this one included; from 1.
        random_value: uniform in [0, 1), for the jitter.
        hint_s: after how long the control plane said that the same may succeed; 0 when it did not.
    """
    cause = cause_of(reason)
    policy = POLICIES[cause]
    final = bool(policy.attempts) and failures >= policy.attempts
    wait_s = 0.0 if final else jittered(policy.first_s, policy.most_s, failures, random_value)
    if hint_s and not final:
        wait_s = max(wait_s, hinted(hint_s, random_value))
    return Decision(final, wait_s, cause in (Cause.DAMAGED, Cause.BASE))


def hinted(hint_s: float, random_value: float) -> float:
    """The wait that the control plane asked for, bounded, and a little more, so that a fleet does not come in
    step.

    Args:
        hint_s: what it said, seconds.
        random_value: uniform in [0, 1).
    """
    return min(hint_s, HINT_MOST_S) * (1 + HINT_JITTER * random_value)


def wants_full(reason: ErrorReason.ValueType | None, failures: int) -> bool:
    """Whether the next plan should offer no bases, so that it brings full copies.

    A delta damaged once may have been damaged on the way; damaged twice, it is not to be trusted, and neither
    is a base that was found wrong twice. A decoder that lacks a feature, or a delta over its limits, will not
    do better the second time.
    """
    if reason in (errors_pb2.DELTA_UNSUPPORTED, errors_pb2.DELTA_LIMIT_EXCEEDED):
        return True
    return reason is not None and cause_of(reason) in (Cause.DAMAGED, Cause.BASE) and failures >= 2


def jittered(first_s: float, most_s: float, failures: int, random_value: float) -> float:
    """A wait with full jitter.

    Args:
        first_s: bound after the first failure, seconds.
        most_s: largest bound, seconds.
        failures: in a row, from 1; each doubles the bound.
        random_value: uniform in [0, 1): the wait lies between a tenth of the bound and all of it.
    """
    bound = min(most_s, first_s * 2.0 ** min(failures - 1, 30))
    return bound * (0.1 + 0.9 * random_value)


class Backoff:
    """Growing waits for one peer, reset once it has been stable.

    Args:
        first_s: bound of the first wait, seconds.
        most_s: bound of any wait, seconds.
    """

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def next_wait_s(self) -> float:
        """The wait before the next attempt, counting one more failure."""
        self._failures += 1
        return jittered(self._first_s, self._most_s, self._failures, random.random())  # noqa: S311 - jitter
