"""The JSON of each command: protobuf messages as plain values with stable names (docs/cli.md).

Enumerations are lower-case words without their prefix, times RFC 3339 in UTC or null, sizes bytes, absent
numbers 0. A field is never renamed or dropped; new ones may come.
"""

from __future__ import annotations

import json
import math
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from sluice.api.v1 import devices_pb2, diff_pb2, errors_pb2, registry_pb2, rollouts_pb2, sync_pb2
from updater.delta import Region


def time_text(stamp: Timestamp) -> str | None:
    """RFC 3339 with seconds, or None when unset."""
    return stamp.ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ") if stamp.seconds else None


def rollout_state(value: int) -> str:
    """One of "running", "paused", "succeeded", "failed", "aborted"."""
    return _word(rollouts_pb2.RolloutState.DESCRIPTOR, value, "ROLLOUT_STATE_")


def device_rollout_state(value: int) -> str:
    """One of "waiting", "updating", "done", "failed", "aborted"."""
    return _word(rollouts_pb2.RolloutDeviceState.DESCRIPTOR, value, "ROLLOUT_DEVICE_STATE_")


def step(value: int) -> str:
    """Such as "fetching", "warming_up", …; "" when idle."""
    return _word(sync_pb2.UpdateStep.DESCRIPTOR, value, "UPDATE_STEP_")


def device_state(value: int) -> str:
    """One of "pending", "accepted", "rejected", "revoked"."""
    return _word(devices_pb2.DeviceState.DESCRIPTOR, value, "DEVICE_STATE_")


def reason(value: int) -> str:
    """An error's stable code; "" for none."""
    found = errors_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(value)
    return "" if value == 0 else found.name if found is not None else str(value)


def _word(enum: Any, value: int, prefix: str) -> str:
    if value == 0:
        return ""
    found = enum.values_by_number.get(value)
    return found.name.removeprefix(prefix).lower() if found is not None else str(value)


def model(message: registry_pb2.Model) -> dict[str, Any]:
    """A model."""
    return {
        "name": message.name,
        "latest_version": message.latest_version,
        "aliases": dict(sorted(message.aliases.items())),
        "create_time": time_text(message.create_time),
    }


def version(message: registry_pb2.Version, *, manifest: bool = False) -> dict[str, Any]:
    """A version, with its manifest if wanted."""
    document: dict[str, Any] = {
        "model": message.model,
        "version": message.version,
        "manifest_digest": message.manifest_digest,
        "retired": message.retired,
        "size_bytes": message.size_bytes,
        "create_time": time_text(message.create_time),
        "variants": list(message.variants),
    }
    if manifest:
        document["manifest"] = json.loads(message.manifest)
    return document


def device(message: devices_pb2.Device) -> dict[str, Any]:
    """A device with its capabilities, desired and reported state."""
    can = message.capabilities
    return {
        "id": message.id,
        "state": device_state(message.state),
        "online": message.online,
        "last_seen_time": time_text(message.last_seen_time),
        "create_time": time_text(message.create_time),
        "labels": dict(sorted(message.labels.items())),
        "agent_version": message.agent_version,
        "capabilities": {
            "architecture": can.architecture,
            "board": can.board,
            "cpu_count": can.cpu_count,
            "memory_bytes": can.memory_bytes,
            "runtimes": [
                {
                    "name": runtime.name,
                    "version": runtime.version,
                    "formats": list(runtime.formats),
                    "accelerators": list(runtime.accelerators),
                }
                for runtime in can.runtimes
            ],
            "delta_features": list(can.delta_features),
        },
        "desired": [
            {
                "model": wanted.model,
                "version": wanted.version,
                "manifest_digest": wanted.manifest_digest,
                "rollout_id": wanted.rollout_id,
            }
            for wanted in message.desired.models
        ],
        "reported": [_reported(found) for found in message.reported.models],
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


def rollout(message: rollouts_pb2.Rollout, *, devices: bool = True) -> dict[str, Any]:
    """A rollout, with its devices if wanted."""
    document: dict[str, Any] = {
        "id": message.id,
        "model": message.model,
        "version": message.version,
        "state": rollout_state(message.state),
        "verdict": message.verdict,
        "create_time": time_text(message.create_time),
        "end_time": time_text(message.end_time),
        "phases": [
            {
                "device_ids": list(phase.selector.device_ids),
                "labels": dict(sorted(phase.selector.labels.items())),
                "deadline_s": phase.deadline_s,
                "max_failed_percent": phase.max_failed_percent,
            }
            for phase in message.phases
        ],
    }
    if devices:
        document["devices"] = [
            {
                "device_id": entry.device_id,
                "state": device_rollout_state(entry.state),
                "step": step(entry.step),
                "from_version": entry.from_version,
                "fetched_bytes": entry.fetched_bytes,
                "fetch_total_bytes": entry.fetch_total_bytes,
                "reason": reason(entry.reason),
                "message": entry.message,
                "end_time": time_text(entry.end_time),
            }
            for entry in message.devices
        ]
    return document


def region(entry: Region | diff_pb2.Region) -> dict[str, Any]:
    """A region of a delta, ours or the control plane's."""
    return {
        "name": entry.name,
        "base_name": entry.base_name,
        "instruction": entry.instruction,
        "predictor": entry.predictor,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "target_offset": entry.target_offset,
        "target_length": entry.target_length,
        "coded_bytes": entry.coded_bytes,
        "bits_per_weight": _bits_per_weight(entry),
    }


def _bits_per_weight(entry: Region | diff_pb2.Region) -> float | None:
    """Bits of the delta for each element of a tensor; None between tensors and for empty ones."""
    elements = math.prod(entry.shape) if entry.dtype else 0
    return 8 * entry.coded_bytes / elements if elements else None
