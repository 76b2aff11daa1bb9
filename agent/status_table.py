"""What `sluice-agent status` prints: the agent's status as text of at most 80 columns. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sluice.api.v1 import admin_pb2, sync_pb2
from sluice.api.v1.errors_pb2 import ErrorReason

WIDTH = 80
ENDS = ("committed", "reverted", "abandoned", "superseded", "stranded")


def size(count: int) -> str:
    """Bytes for people, decimal as in `sluice`: "999 B", "1.0 kB", "22.8 MB"."""
    if count < 1000:
        return f"{count} B"
    value = count / 1000
    units = ["TB", "GB", "MB", "kB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop()
    return f"{value:.1f} {units[-1]}"


def duration(seconds: int) -> str:
    """Seconds for people: "42 s", "3 h 5 min", "12 d 4 h"."""
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def render(status: admin_pb2.GetStatusResponse) -> str:
    """The whole status."""
    link = "connected" if status.control_connected else "not connected"
    why = _wrap(status.control_error, "            ") if status.control_error else []
    lines = [
        f"device      {status.device_id}",
        f"agent       sluice {status.agent_version}, up {duration(status.uptime_s)}",
        f"process     {status.process_id}",
        f"control     {status.control_address}   {link}",
        *why,
        f"inference   {status.inference_address or 'not yet'}",
        f"disk        store {size(status.store_bytes)}, free {size(status.disk_free_bytes)}",
        f"telemetry   {count(status.outbox_batches, 'batch', 'batches')} to be sent",
    ]
    lines.append("")
    if not status.reported.models:
        lines.append("no models yet: roll one out with `sluice rollout start`")
    else:
        lines += _table(
            ("MODEL", "SERVES", "VARIANT", "HEALTHY", "PREVIOUS", "TARGET", "STEP"),
            [_model_row(model) for model in status.reported.models],
        )
    for model in status.reported.models:
        if model.HasField("failure"):
            failure = model.failure
            fate = (
                "given up"
                if failure.final
                else f"{count(failure.attempts, 'attempt', 'attempts')}, trying on"
            )
            head = f"{model.model}@{failure.version} {ErrorReason.Name(failure.reason)} ({fate}): "
            lines += ["", *_wrap(head + failure.message, "")]
    told = {(model.model, model.failure.version) for model in status.reported.models}
    active = {model.model: model.active_version for model in status.reported.models}
    for swap in status.swaps:
        answers = active.get(swap.model, swap.to_version)
        lines += ["", *_swap(swap, told=(swap.model, swap.to_version) in told, answers=answers)]
    if status.workers:
        lines.append("")
        lines += _table(
            ("WORKER", "ROLE", "RUNTIME", "PROCESS", "MEMORY", "REQUESTS", "FAILED"),
            [
                (
                    f"{worker.model}@{worker.version}",
                    worker.role,
                    worker.runtime,
                    str(worker.process_id),
                    size(worker.resident_bytes),
                    str(worker.requests),
                    str(worker.failures),
                )
                for worker in status.workers
            ],
        )
        lines += _renewals(status.workers)
    return "\n".join(line[:WIDTH].rstrip() for line in lines) + "\n"


def _renewals(workers: Sequence[admin_pb2.WorkerStatus]) -> list[str]:
    """A line for each version whose processes were renewed for the memory that they held."""
    versions = {(worker.model, worker.version): worker for worker in workers if worker.renewals}
    lines = []
    for (model, version), worker in versions.items():
        times = count(worker.renewals, "time", "times")
        text = f"{model}@{version}: renewed {times} for holding over {size(worker.memory_limit_bytes)}"
        lines += _wrap(text, "")
    return ["", *lines] if lines else []


def span(milliseconds: int) -> str:
    """A short time for people: "3 ms", "4.2 s", "75 s", "12 min"."""
    if milliseconds < 1000:
        return f"{milliseconds} ms"
    if milliseconds < 10_000:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds // 1000} s" if milliseconds < 120_000 else duration(milliseconds // 1000)


def _swap(swap: admin_pb2.SwapStatus, *, told: bool, answers: int) -> list[str]:
    """A change of version: where it is, what it has been through, what was seen.

    `told`: its failure is; `answers`: the version that does so now, another one after a revert.
    """
    head = f"{swap.model} {swap.from_version or '-'} -> {swap.to_version}: {swap.phase}"
    ended = swap.phase in ENDS
    head += f", {span(swap.phase_ms)} ago" if ended else f" for {span(swap.phase_ms)}"
    if swap.phase == "committed" and answers != swap.to_version:
        head += f"; {f'version {answers} answers' if answers else 'nothing answers'} now"
    if swap.left_ms and not ended:
        head += f", {span(swap.left_ms)} left"
    lines = _wrap(head, "")
    if swap.failure and not told:
        lines += _wrap(swap.failure, "  ")
    if swap.passed:
        lines += _wrap(", ".join(f"{phase.phase} {span(phase.ms)}" for phase in swap.passed), "  ")
    facts = []
    if swap.gap_ms:
        facts.append(f"nothing answered for {span(swap.gap_ms)}")
    if swap.compared or swap.unanswered or swap.dropped:
        facts.append(
            f"shadow: {swap.compared} compared, {swap.mismatched} unlike, {swap.unanswered} unanswered,"
            f" {swap.dropped} dropped; cosine {swap.cosine_min:.4f}, error {swap.max_abs_error:.3g}"
        )
    if swap.requests:
        facts.append(f"soak: {swap.requests} requests, {swap.failures} failed")
    if swap.p95_ms:
        before = f", before {swap.previous_p95_ms:.1f} ms" if swap.previous_p95_ms else ""
        facts.append(f"p95 {swap.p95_ms:.1f} ms{before}")
    for fact in facts:
        lines += _wrap(fact, "  ")
    return lines


def count(number: int, one: str, many: str) -> str:
    """Such as "1 file" or "3 files"."""
    return f"{number} {one if number == 1 else many}"


def _model_row(model: sync_pb2.ReportedModel) -> tuple[str, ...]:
    step = sync_pb2.UpdateStep.Name(model.step).removeprefix("UPDATE_STEP_").lower().replace("_", " ")
    if model.step == sync_pb2.UPDATE_STEP_UNSPECIFIED:
        step = "-"
    if model.step == sync_pb2.UPDATE_STEP_FETCHING and model.fetch_total_bytes:
        step += f" {100 * model.fetched_bytes // model.fetch_total_bytes} %"
    if model.pinned_version:
        step = "pinned"
    return (
        model.model,
        str(model.active_version or "-"),
        model.variant or "-",
        "yes" if model.healthy else "NO",
        str(model.previous_version or "-"),
        str(model.target_version or "-"),
        step,
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need; when all together are too wide, the widest give way."""
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    return [
        "  ".join(_fit(cell, width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)
    ]


def _fit(cell: str, width: int) -> str:
    return (cell if len(cell) <= width else cell[: width - 1] + "…").ljust(width)


def _wrap(text: str, indent: str) -> list[str]:
    lines, line = [], indent
    for word in text.split():
        if len(line) + len(word) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = indent
        line += word + " "
    return [*lines, line.rstrip()]
