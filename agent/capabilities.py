"""What this box is and can run: probed once at start, told to the control plane in Hello."""

from __future__ import annotations

import logging
import os
import platform
from importlib import metadata
from pathlib import Path

import psutil

from agent.chooser import Box, RuntimeFacts
from agent.config import AgentConfig
from runtimes import survey
from runtimes.interface import ExternalDelegate
from sluice.api.v1 import sync_pb2
from updater.delta import FEATURES

log = logging.getLogger(__name__)
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAX_BOARD_CHARACTERS = 128


def probe_box(allowed_runtimes: tuple[str, ...], delegates: tuple[ExternalDelegate, ...] = ()) -> Box:
    """Probes the box: each runtime by a real inference in a process of its own, which takes about a second.

    Args:
        allowed_runtimes: names that the configuration allows; empty for all.
        delegates: of this box, tried as the runtimes are.
    """
    runtimes = []
    for probe in survey.survey(delegates=delegates):
        if allowed_runtimes and probe.runtime not in allowed_runtimes:
            continue
        if probe.usable:
            for reason in probe.passed_over:
                log.warning("%s: %s", probe.runtime, reason)
            runtimes.append(RuntimeFacts(probe.runtime, probe.version, probe.formats, probe.accelerators))
        else:
            log.info("runtime not used: %s", probe.error)
    return Box(
        architecture=platform.machine(),
        board=board(),
        cpu_count=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        runtimes=tuple(runtimes),
    )


def board() -> str:
    """The device-tree model, e.g. "Raspberry Pi 5 Model B Rev 1.0", or "generic"."""
    try:
        text = _DEVICE_TREE_MODEL.read_bytes().rstrip(b"\0").decode("utf-8", "replace").strip()
    except OSError:
        return "generic"
    return text[:MAX_BOARD_CHARACTERS] or "generic"


def agent_version() -> str:
    """The version of the sluice package."""
    return metadata.version("sluice")


def hello(config: AgentConfig, box: Box, generation: int) -> sync_pb2.Hello:
    """How this device introduces itself, having taken up this generation of its desired state."""
    try:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # a container without /proc/sys
        boot_id = ""
    return sync_pb2.Hello(
        device_id=config.device_id,
        agent_version=agent_version(),
        boot_id=boot_id,
        labels=config.labels,
        desired_generation=generation,
        capabilities=sync_pb2.Capabilities(
            architecture=box.architecture,
            board=box.board,
            cpu_count=box.cpu_count,
            memory_bytes=box.memory_bytes,
            runtimes=[
                sync_pb2.RuntimeCapability(
                    name=runtime.name,
                    version=runtime.version,
                    formats=runtime.formats,
                    accelerators=runtime.accelerators,
                )
                for runtime in box.runtimes
            ],
            delta_features=FEATURES,
        ),
    )
