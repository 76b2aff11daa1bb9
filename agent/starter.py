"""From files on disk to a worker that has proven itself: hash, load, first inference, golden inputs, batches.

The parts are separate because a change of version may be given up between any two of them; `bring_up` does
them all. A worker that fails a part is the caller's to close, but for `bring_up`, which closes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from agent import golden, growth, options, placement, swap_options
from agent.batch_proof import batches_are_safe
from agent.batch_terms import Gate
from agent.installer import Prepared
from agent.memory import box_bytes
from agent.scheduling import Policy
from agent.version_directory import verify
from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from runtimes.interface import ExternalDelegate
from updater.store import Store

log = logging.getLogger(__name__)


class Starter:
    """Makes workers of prepared versions. Methods may be called from any thread.

    Args:
        store: of this box.
        threads: of a model's runtime unless its variant says otherwise.
        load_deadline_s: for loading, and for each inference of the checks, seconds.
        gate: what low-priority requests wait for; None: nothing.
        process_bytes: most memory of a process, unless its variant says otherwise; 0: by what it holds.
        delegates: the external delegates of this box.
    """

    def __init__(
        self,
        store: Store,
        *,
        threads: int,
        load_deadline_s: float,
        gate: Gate | None = None,
        process_bytes: int = 0,
        delegates: tuple[ExternalDelegate, ...] = (),
    ) -> None:
        self._store = store
        self._process_bytes = process_bytes
        self._delegates = delegates
        self._threads = threads
        self._load_deadline_s = load_deadline_s
        self._gate = gate

    def verify(self, model: str, prepared: Prepared) -> tuple[str, ...]:
        """Re-hashes every file; returns the digests. Raises SluiceError(STORE_CORRUPT | IO_FAILED)."""
        version = prepared.installed.version
        return verify(prepared.directory, model, version, prepared.variant, self._store)

    def instances(self, prepared: Prepared) -> int:
        """How many processes the version wants."""
        return options.read(prepared.variant.options, self._threads).instances

    def start(
        self,
        model: str,
        prepared: Prepared,
        digests: tuple[str, ...],
        started: Callable[[Worker], None] | None = None,
        *,
        beside: bool = False,
    ) -> Worker:
        """A worker that has loaded the version. Raises what `Worker.start` raises.

        Args:
            model: its name.
            prepared: the version.
            digests: of its files, as verified.
            started: see `Worker.start`.
            beside: another version of the model serves meanwhile.
        """
        installed, variant = prepared.installed, prepared.variant
        wanted = options.read(variant.options, self._threads, variant.accelerator)
        for fault in (*wanted.faults, *options.unknown(variant.options, swap_options.NAMES)):
            log.warning("%s@%d: %s", model, installed.version, fault)
        spec = WorkerSpec(
            model=model,
            version=installed.version,
            path=prepared.directory / variant.model_file.path,
            format=variant.format,
            runtime_preference=installed.runtime,
            threads=wanted.threads,
            accelerators=wanted.accelerators,
            optimization=wanted.optimization,
            xnnpack=wanted.xnnpack,
            delegates=self._delegates,
            loaded_digests=digests,
            beside=beside,
            instances=wanted.instances,
        )
        return placement.start(spec, self._load_deadline_s, started)

    def warm_up(self, worker: Worker) -> None:
        """The first inference. Raises SluiceError(WARM_UP_FAILED)."""
        golden.warm_up(worker, self._load_deadline_s)

    def prove(self, worker: Worker, prepared: Prepared) -> None:
        """Golden inputs and batches; the worker may serve then. Raises SluiceError(GOLDEN_MISMATCH | ...)."""
        variant = prepared.variant
        wanted = options.read(variant.options, self._threads, variant.accelerator, self._process_bytes)
        examples = None
        if variant.golden_file is not None:
            path = prepared.directory / variant.golden_file.path
            golden.check_golden(worker, path, variant.tolerance, self._load_deadline_s)
            examples = golden.convert_inputs(worker, golden.read_golden(path)[0])
        worker.cache_s, worker.cascade = wanted.cache_s, wanted.cascade
        worker.versions = wanted.versions
        worker.queue.policy = self._policy(worker, wanted.policy, examples)
        worker.queue.gate, worker.queue.threads = self._gate, wanted.threads
        worker.checked()
        base, most = worker.base_bytes, wanted.process_bytes
        worker.memory_limit = growth.limit(most, base, box_bytes(), worker.spec.instances)
        if most and base > most:
            log.warning("%s holds %d bytes once checked, over its limit of %d", worker.spec, base, most)

    def bring_up(self, model: str, prepared: Prepared) -> Worker:
        """All of it. Raises SluiceError; no worker is left behind then."""
        worker = self.start(model, prepared, self.verify(model, prepared))
        try:
            self.warm_up(worker)
            self.prove(worker, prepared)
        except BaseException:
            worker.close(0)
            raise
        return worker

    def _policy(self, worker: Worker, policy: Policy, examples: golden.Arrays | None) -> Policy:
        """The policy, with batches only for a model that was seen to answer right in them."""
        if policy.max_batch == 1 or not worker.takes_batches:
            return replace(policy, max_batch=1)
        why_not = batches_are_safe(worker, examples, self._load_deadline_s, policy.cosine_min)
        if why_not:
            log.warning("requests to %s run one by one: %s", worker.spec, why_not)
            return replace(policy, max_batch=1)
        return policy
