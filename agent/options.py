"""How a version wants to be run: the options of its variant, as texts in the manifest, checked. Pure.

| option | what | default |
|---|---|---|
| threads | that one inference may use | the agent's inference.threads |
| instances | processes that hold the model, each with one inference at a time | 1 |
| process_memory_bytes | memory of its own that a process may hold | by what it held once checked |
| providers | what to run on, best first, e.g. "tensorrt,cuda,cpu" | the variant's accelerator, then cpu |
| graph_optimization | of an ONNX graph: off, basic, extended or all | all |
| xnnpack | "off": TensorFlow Lite runs without XNNPACK | on |
| batch | most samples in a batch made of several requests; "off" forbids batches | 64 |
| batch_cosine | least similarity of an answer in a batch to the answer alone, for batches to be used | 0.99 |
| batch_preferred | batch sizes sent without waiting for more, e.g. "4,8" | none |
| batch_window_ms | longest wait for a fuller batch while the worker is free, where that pays | 0 |
| batch_target_ms | how long a batch should run at most | 50 |
| queue | requests that may wait, at most | 256 |
| breaker_ms | from arrival to answer; slower answers open the latency breaker | no breaker |
| cache_ttl_s | for how long an answer may be given again to the same inputs | never |
| versions | which others are loaded beside it: "latest:3", "all", or numbers | none |
| cascade_to | the model (or model@version) that answers what this one is unsure of | none |
| cascade_threshold | of the score, 0 to 1; what is under it is handed on | 0.7 |
| cascade_weights | of confidence and of 1 - normalised entropy | 0.6,0.4 |
| cascade_output | the output that is scored | the first of floating-point numbers |
| cascade_scores | what it holds: logits or probabilities | logits |

Options of a change of version stand in swap_options.py. An option that is not understood is left at its
default and reported, and so is a name that neither file has: a model that worked where it was
published must not fail on a box for the way it is served.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from agent.cascade import LOGITS, PROBABILITIES, Cascade
from agent.limits import (
    BATCH_COSINE_MIN,
    BATCH_TARGET_S,
    MAX_BATCH,
    MAX_INSTANCES,
    MAX_PROVIDERS,
    MAX_QUEUE,
    MAX_REQUEST_S,
)
from agent.scheduling import Policy
from agent.version_policy import VersionPolicy
from agent.version_policy import parse as parse_versions
from runtimes.interface import CPU, OPTIMIZATIONS

MAX_THREADS = 256
MAX_CACHE_TTL_S = 86_400
MAX_PROCESS_BYTES = 1 << 40
_MOST_MS = int(MAX_REQUEST_S * 1000)
_OFF, _ON = "off", "on"
_SHARE = re.compile(r"[01](\.[0-9]{1,9})?")
_PROVIDER = re.compile(r"[a-z][a-z0-9_]{0,31}")


NAMES = frozenset(
    (
        *("threads", "instances", "process_memory_bytes", "providers", "graph_optimization", "xnnpack"),
        *("batch", "batch_cosine", "batch_preferred", "batch_window_ms", "batch_target_ms"),
        *("queue", "breaker_ms", "cache_ttl_s", "versions"),
        *("cascade_to", "cascade_threshold", "cascade_weights", "cascade_output", "cascade_scores"),
    )
)


@dataclass(frozen=True)
class Options:
    """What the options say.

    Attributes:
        threads: of one inference.
        policy: for the queue; its max_batch only holds for a model that takes batches.
        cache_s: lifetime of cached answers, seconds; 0: none are kept.
        accelerators: what to run on, best first.
        optimization: of an ONNX graph, one of OPTIMIZATIONS.
        xnnpack: whether TensorFlow Lite may use XNNPACK.
        versions: which other versions are loaded beside it; None: none are.
        cascade: whom it hands samples on to; whether that works is checked where the models are known.
        instances: processes that hold the model.
        process_bytes: most memory of its own that one may hold; 0: by what it held once it was checked.
        faults: what was not understood, as sentences.
    """

    threads: int
    policy: Policy
    cache_s: float = 0.0
    accelerators: tuple[str, ...] = (CPU,)
    optimization: str = OPTIMIZATIONS[-1]
    xnnpack: bool = True
    cascade: Cascade | None = None
    versions: VersionPolicy | None = None
    instances: int = 1
    process_bytes: int = 0
    faults: tuple[str, ...] = ()


def unknown(options: Mapping[str, str], others: Collection[str]) -> list[str]:
    """What is said of names that are options neither here nor among `others`: they are misspelt, or newer."""
    return [
        f"there is no option {name[:40]!r}" + _likely(name, (*NAMES, *others))
        for name in sorted(options)
        if name not in NAMES and name not in others
    ]


def _likely(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), 1)
    return f"; is {close[0]!r} meant?" if close else ""


def read(options: Mapping[str, str], threads: int, accelerator: str = CPU, process_bytes: int = 0) -> Options:
    """The options of a variant.

    Args:
        options: as the manifest has them.
        threads: the agent's default.
        accelerator: the variant's.
        process_bytes: the agent's default.
    """
    faults: list[str] = []

    def number(name: str, default: int, least: int, most: int) -> int:
        text = options.get(name)
        if text is None:
            return default
        if text.isascii() and text.isdigit() and least <= int(text) <= most:
            return int(text)
        faults.append(f"option {name} is {text[:40]!r}, not a number from {least} to {most}")
        return default

    def choice(name: str, choices: Sequence[str], default: str) -> str:
        text = options.get(name, default)
        if text in choices:
            return text
        faults.append(f"option {name} is {text[:40]!r}, not one of {', '.join(choices)}")
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
    instances = number("instances", 1, 1, MAX_INSTANCES)
    most_bytes = number("process_memory_bytes", process_bytes, 1, MAX_PROCESS_BYTES)
    cache_s = float(number("cache_ttl_s", 0, 1, MAX_CACHE_TTL_S))
    accelerators = _accelerators(options.get("providers"), accelerator, faults)
    optimization = choice("graph_optimization", OPTIMIZATIONS, OPTIMIZATIONS[-1])
    xnnpack = choice("xnnpack", (_ON, _OFF), _ON) == _ON
    scores = choice("cascade_scores", (LOGITS, PROBABILITIES), LOGITS)
    cascade = _cascade(options, scores, faults)
    versions = _versions(options.get("versions"), faults)
    return Options(
        most_threads,
        policy,
        cache_s,
        accelerators,
        optimization,
        xnnpack,
        cascade,
        versions,
        instances,
        most_bytes,
        tuple(faults),
    )


def _versions(text: str | None, faults: list[str]) -> VersionPolicy | None:
    policy = None if text is None else parse_versions(text.strip())
    if text is not None and policy is None:
        faults.append(f"option versions is {text[:40]!r}, not latest:N, all, or numbers such as 1,4")
    return policy


def _cascade(options: Mapping[str, str], scores: str, faults: list[str]) -> Cascade | None:
    to = options.get("cascade_to")
    if to is None:
        given = sorted(name for name in options if name.startswith("cascade_"))
        faults += [f"option {name} has no effect without cascade_to" for name in given]
        return None

    def shares(name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        text = options.get(name)
        if text is None:
            return default
        parts = [part.strip() for part in text.split(",")]
        if len(parts) == len(default) and all(_SHARE.fullmatch(part) and float(part) <= 1 for part in parts):
            return tuple(map(float, parts))
        wanted = "a number" if len(default) == 1 else f"{len(default)} numbers"
        faults.append(f"option {name} is {text[:40]!r}, not {wanted} from 0 to 1")
        return default

    (threshold,) = shares("cascade_threshold", (Cascade.threshold,))
    confidence, entropy = shares("cascade_weights", (Cascade.confidence_weight, Cascade.entropy_weight))
    return Cascade(to, threshold, confidence, entropy, options.get("cascade_output", ""), scores)


def _accelerators(text: str | None, accelerator: str, faults: list[str]) -> tuple[str, ...]:
    """The list in order, each once; the CPU is last where nothing else is said."""
    default = (CPU,) if accelerator == CPU else (accelerator, CPU)
    if text is None:
        return default
    names = [name.strip().lower() for name in text.split(",")]
    if len(names) > MAX_PROVIDERS or not all(_PROVIDER.fullmatch(name) for name in names):
        faults.append(f"option providers is {text[:40]!r}, not 1 to {MAX_PROVIDERS} names such as cuda,cpu")
        return default
    return tuple(dict.fromkeys(names))


def _cosine(text: str | None, faults: list[str]) -> float:
    if text is None:
        return BATCH_COSINE_MIN
    if re.fullmatch(r"0\.\d{1,6}|1(\.0{1,6})?", text, re.ASCII):
        return float(text)
    faults.append(f"option batch_cosine is {text[:40]!r}, not a number from 0.0 to 1 such as 0.95")
    return BATCH_COSINE_MIN
