"""The JSON of each command: plain values with stable names (docs/agent-cli.md), in the dialect of `sluice`.

Enumerations are lower-case words without their prefix, times RFC 3339 in UTC or null, numbers are numbers,
sizes bytes, absent numbers 0, absent texts empty. Every field is always there; none is ever renamed or
dropped; new ones may come. A desired and a reported model look as in `sluice device show --json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

from sluice.api.v1 import admin_pb2, errors_pb2, sync_pb2

if TYPE_CHECKING:  # heavy, and only the doctor needs it
    from agent.doctor import Finding


def status(message: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """What `sluice-agent status` shows."""
    return {
        "device_id": message.device_id,
        "agent_version": message.agent_version,
        "process_id": message.process_id,
        "uptime_s": message.uptime_s,
        "time": time_text(message.reported.time),
        "control_address": message.control_address,
        "control_connected": message.control_connected,
        "control_error": message.control_error,
        "inference_address": message.inference_address,
        "desired_generation": message.desired.generation,
        "desired": [_desired(model) for model in message.desired.models],
        "reported": [_reported(model) for model in message.reported.models],
        "store_bytes": message.store_bytes,
        "disk_free_bytes": message.disk_free_bytes,
        "outbox_batches": message.outbox_batches,
        "workers": [_worker(worker) for worker in message.workers],
        "swaps": [_swap(swap) for swap in message.swaps],
    }


def revert(model: str, message: admin_pb2.RevertResponse) -> dict[str, Any]:
    """From which version to which a model went back."""
    return {"model": model, "from_version": message.from_version, "to_version": message.to_version}


def finding(found: Finding) -> dict[str, Any]:
    """One check of the doctor."""
    return {
        "check": found.check,
        "state": found.state,
        "detail": found.detail,
        "hint": found.hint,
        "reason": found.error.code if found.error is not None else "",
    }


def time_text(stamp: Timestamp) -> str | None:
    """RFC 3339 with seconds, or None when unset."""
    return stamp.ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ") if stamp.seconds else None


def step(value: int) -> str:
    """Such as "fetching", "warming_up"; "" when idle."""
    found = sync_pb2.UpdateStep.DESCRIPTOR.values_by_number.get(value)
    if value == 0 or found is None:
        return "" if value == 0 else str(value)
    return str(found.name).removeprefix("UPDATE_STEP_").lower()


def reason(value: int) -> str:
    """An error's stable code; "" for none."""
    found = errors_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(value)
    if value == 0 or found is None:
        return "" if value == 0 else str(value)
    return str(found.name)


def _desired(message: sync_pb2.DesiredModel) -> dict[str, Any]:
    return {
        "model": message.model,
        "version": message.version,
        "manifest_digest": message.manifest_digest,
        "rollout_id": message.rollout_id,
    }


def _reported(message: sync_pb2.ReportedModel) -> dict[str, Any]:
    failure = message.failure
    return {
        "model": message.model,
        "active_version": message.active_version,
        "active_manifest_digest": message.active_manifest_digest,
        "variant": message.variant,
        "loaded_digests": list(message.loaded_digests),
        "healthy": message.healthy,
        "previous_version": message.previous_version,
        "target_version": message.target_version,
        "step": step(message.step),
        "fetched_bytes": message.fetched_bytes,
        "fetch_total_bytes": message.fetch_total_bytes,
        "pinned_version": message.pinned_version,
        "gap_ms": message.gap_ms,
        "failure": {
            "version": failure.version,
            "reason": reason(failure.reason),
            "message": failure.message,
            "attempts": failure.attempts,
            "final": failure.final,
        }
        if message.HasField("failure")
        else None,
    }


def _worker(message: admin_pb2.WorkerStatus) -> dict[str, Any]:
    return {
        "model": message.model,
        "version": message.version,
        "process_id": message.process_id,
        "runtime": message.runtime,
        "role": message.role,
        "resident_bytes": message.resident_bytes,
        "requests": message.requests,
        "failures": message.failures,
        "private_bytes": message.private_bytes,
        "memory_limit_bytes": message.memory_limit_bytes,
        "renewals": message.renewals,
    }


def _swap(message: admin_pb2.SwapStatus) -> dict[str, Any]:
    return {
        "model": message.model,
        "from_version": message.from_version,
        "to_version": message.to_version,
        "phase": message.phase,
        "phase_ms": message.phase_ms,
        "left_ms": message.left_ms,
        "memory_needed_bytes": message.memory_needed_bytes,
        "memory_available_bytes": message.memory_available_bytes,
        "gap_ms": message.gap_ms,
        "compared": message.compared,
        "mismatched": message.mismatched,
        "unanswered": message.unanswered,
        "dropped": message.dropped,
        "cosine_min": message.cosine_min,
        "max_abs_error": message.max_abs_error,
        "requests": message.requests,
        "failures": message.failures,
        "p95_ms": message.p95_ms,
        "previous_p95_ms": message.previous_p95_ms,
        "passed": [{"phase": phase.phase, "ms": phase.ms} for phase in message.passed],
        "failure": message.failure,
    }
