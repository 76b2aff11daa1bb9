"""How a version wants to be exchanged: options of its variant over the agent's configuration, checked. Pure.

| option | what | the agent's default |
|---|---|---|
| shadow_percent | of live requests that it answers too before it is activated | update.shadow_percent |
| shadow_s | longest time of that | update.shadow_s |
| shadow_requests | compared requests that suffice | update.shadow_requests |
| shadow_cosine | least cosine similarity of each output | update.shadow_cosine |
| shadow_max_error | largest absolute difference of each output | no bound |
| shadow_mismatch_percent | of compared requests that may miss that | update.shadow_mismatch_percent |
| soak_s | how long it must prove itself | update.soak_s |
| soak_requests | fewer say nothing | update.soak_requests |
| soak_error_percent | of requests that may fail beyond those before; 100: any | update.soak_error_percent |
| soak_latency_ratio | of its 95th percentile to the one before; 0: any | update.soak_latency_ratio |
| keep_previous | the old worker during the soak: warm or disk | update.keep_previous |
| memory_short | where two workers do not fit: refuse or stop-then-start | update.memory_short |

As in options.py, an option that is not understood is left at its default and reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from agent.config import KEEP, KEYS, MEMORY_SHORT, AgentConfig
from agent.judging import Gates, ShadowTerms
from agent.swap import Terms

_DECIMAL = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_RANGES = {key.name.removeprefix("update."): key for key in KEYS if key.name.startswith("update.")}
_MAX_ERROR = 1e9

NAMES = frozenset(
    (
        *("shadow_percent", "shadow_s", "shadow_requests", "shadow_cosine", "shadow_max_error"),
        *("shadow_mismatch_percent", "soak_s", "soak_requests", "soak_error_percent", "soak_latency_ratio"),
        *("keep_previous", "memory_short"),
    )
)


def read(options: Mapping[str, str], config: AgentConfig) -> tuple[Terms, list[str]]:
    """The terms of a version, and what was not understood, as sentences."""
    faults: list[str] = []

    def number(name: str, default: float, least: float, most: float) -> float:
        text = options.get(name)
        if text is None:
            return default
        if _DECIMAL.fullmatch(text) and least <= float(text) <= most:
            return float(text)
        faults.append(f"option {name} is {text[:40]!r}, not a number from {least:g} to {most:g}")
        return default

    def like(name: str, default: float) -> float:
        """A number with the range of the configuration's key of the same name."""
        key = _RANGES[name]
        return number(name, default, key.least, key.most)

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
        text = options.get(name, default)
        if text in allowed:
            return text
        faults.append(f"option {name} is {text[:40]!r}, not one of {', '.join(allowed)}")
        return default

    shadow = ShadowTerms(
        share=like("shadow_percent", config.shadow_percent) / 100,
        seconds=like("shadow_s", config.shadow_s),
        requests=int(like("shadow_requests", config.shadow_requests)),
        cosine_min=like("shadow_cosine", config.shadow_cosine),
        max_abs_error=number("shadow_max_error", 0, 0, _MAX_ERROR) if "shadow_max_error" in options else None,
        mismatch_share=like("shadow_mismatch_percent", config.shadow_mismatch_percent) / 100,
    )
    gates = Gates(
        min_requests=int(like("soak_requests", config.soak_requests)),
        error_share=like("soak_error_percent", config.soak_error_percent) / 100,
        latency_ratio=like("soak_latency_ratio", config.soak_latency_ratio),
    )
    terms = Terms(
        shadow,
        gates,
        soak_s=like("soak_s", config.soak_s),
        keep_warm=choice("keep_previous", config.keep_previous, KEEP) == KEEP[0],
        stop_first=choice("memory_short", config.memory_short, MEMORY_SHORT) == MEMORY_SHORT[1],
        reserve_bytes=config.memory_reserve_bytes,
    )
    return terms, faults
