"""A change of version as `sluice-agent status` gets it. Pure."""

from __future__ import annotations

from agent.judging import Likeness, Outcomes
from agent.memory import Memory
from agent.swapping import Seen
from sluice.api.v1 import admin_pb2


def swap_status(seen: Seen) -> admin_pb2.SwapStatus:
    """The message for one swap."""
    swap, now = seen.swap, seen.now
    memory = swap.memory or Memory(0, 0)
    like = seen.likeness or Likeness()
    new, old = seen.new or Outcomes(), seen.old or Outcomes()
    in_shadow = seen.likeness is not None and not new.requests
    return admin_pb2.SwapStatus(
        model=swap.plan.model,
        from_version=swap.plan.old,
        to_version=swap.plan.version,
        phase=swap.phase.value,
        phase_ms=_ms(now - swap.since),
        left_ms=_ms(swap.left(now) or 0.0),
        memory_needed_bytes=memory.needed,
        memory_available_bytes=memory.available,
        gap_ms=_ms(swap.gap(now)),
        compared=like.compared,
        mismatched=like.mismatched,
        unanswered=like.unanswered,
        dropped=like.dropped,
        cosine_min=like.cosine_min,
        max_abs_error=like.max_abs_error,
        requests=new.requests,
        failures=new.failures,
        p95_ms=1000 * (like.times if in_shadow else new.times).p95_s,
        previous_p95_ms=1000 * (like.previous if in_shadow else old.times).p95_s,
        passed=[admin_pb2.PassedPhase(phase=phase.value, ms=_ms(seconds)) for phase, seconds in seen.passed],
        failure="" if swap.failure is None else swap.failure.message,
    )


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
