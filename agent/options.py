"""How a version wants to be run: the options of its variant, as texts in the manifest, checked. Pure.

| option | what | default |
|---|---|---|
| threads | that one inference may use | the agent's inference.threads |
| batch | most samples in a batch made of several requests; "off" forbids batches | 64 |
| batch_cosine | least similarity of an answer in a batch to the answer alone, for batches to be used | 0.99 |
| batch_preferred | batch sizes sent without waiting for more, e.g. "4,8" | none |
| batch_window_ms | longest wait for a fuller batch while the worker is free, where that pays | 0 |
| batch_target_ms | how long a batch should run at most | 50 |
| queue | requests that may wait, at most | 256 |
| breaker_ms | from arrival to answer; slower answers open the latency breaker | no breaker |
| cache_ttl_s | for how long an answer may be given again to the same inputs | never |

An option that is not understood is left at its default and reported: a model that worked where it was
published must not fail on a box for the way it is served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from agent.limits import BATCH_COSINE_MIN, BATCH_TARGET_S, MAX_BATCH, MAX_QUEUE, MAX_REQUEST_S
from agent.scheduling import Policy

MAX_THREADS = 256
MAX_CACHE_TTL_S = 86_400
_MOST_MS = int(MAX_REQUEST_S * 1000)
_OFF = "off"


@dataclass(frozen=True)
class Options:
    """What the options say.

    Attributes:
        threads: of one inference.
        policy: for the queue; its max_batch only holds for a model that takes batches.
        cache_s: lifetime of cached answers, seconds; 0: none are kept.
        faults: what was not understood, as sentences.
    """

    threads: int
    policy: Policy
    cache_s: float = 0.0
    faults: tuple[str, ...] = ()


def read(options: Mapping[str, str], threads: int) -> Options:
    """The options of a variant; `threads` is the agent's default."""
    faults: list[str] = []

    def number(name: str, default: int, least: int, most: int) -> int:
        text = options.get(name)
        if text is None:
            return default
        if text.isascii() and text.isdigit() and least <= int(text) <= most:
            return int(text)
        faults.append(f"option {name} is {text[:40]!r}, not a number from {least} to {most}")
        return default

    batch = 1 if options.get("batch") == _OFF else number("batch", MAX_BATCH, 1, MAX_BATCH)
    preferred = []
    for text in filter(None, options.get("batch_preferred", "").split(",")):
        if text.isascii() and text.isdigit() and 0 < int(text) <= batch:
            preferred.append(int(text))
        else:
            faults.append(f"option batch_preferred has {text[:40]!r}, not a number from 1 to {batch}")
    policy = Policy(
        max_batch=batch,
        preferred=tuple(sorted(set(preferred))),
        window_s=number("batch_window_ms", 0, 0, _MOST_MS) / 1000,
        target_s=number("batch_target_ms", round(BATCH_TARGET_S * 1000), 1, _MOST_MS) / 1000,
        queue=number("queue", MAX_QUEUE, 1, MAX_QUEUE),
        cosine_min=_cosine(options.get("batch_cosine"), faults),
        breaker_s=number("breaker_ms", 0, 1, _MOST_MS) / 1000,
    )
    most_threads = number("threads", threads, 1, MAX_THREADS)
    cache_s = float(number("cache_ttl_s", 0, 1, MAX_CACHE_TTL_S))
    return Options(most_threads, policy, cache_s, tuple(faults))


def _cosine(text: str | None, faults: list[str]) -> float:
    if text is None:
        return BATCH_COSINE_MIN
    if re.fullmatch(r"0\.\d{1,6}|1(\.0{1,6})?", text, re.ASCII):
        return float(text)
    faults.append(f"option batch_cosine is {text[:40]!r}, not a number from 0.0 to 1 such as 0.95")
    return BATCH_COSINE_MIN
