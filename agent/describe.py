"""What the protocol tells of a loaded version: metadata, configuration, statistics. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.figures import CascadeCounts, Parts, Sum
from agent.scheduling import Policy, Priority
from agent.worker import Worker
from inference import model_config_pb2 as config_pb
from inference import open_inference_pb2 as pb
from runtimes.datatypes import BYTES
from runtimes.detect import ONNX, TFLITE
from runtimes.interface import CPU, TensorSpec

_NANOSECONDS = 1_000_000_000
# Accelerators that are code for the processor.
_ON_PROCESSORS = (CPU, "xnnpack", "openvino", "dnnl", "acl", "armnn")
# As Triton's ONNX Runtime backend numbers them.
_GRAPH_LEVELS = {"all": 0, "extended": 1, "basic": -1, "off": 2}


def metadata(worker: Worker, loaded: Iterable[Worker]) -> pb.ModelMetadataResponse:
    """Inputs and outputs of `worker`, and the versions among `loaded` that can answer."""
    return pb.ModelMetadataResponse(
        name=worker.model,
        versions=map(str, _versions(loaded)),
        platform=_platform(worker),
        inputs=[_tensor(spec) for spec in worker.inputs],
        outputs=[_tensor(spec) for spec in worker.outputs],
    )


def config(worker: Worker, loaded: Sequence[Worker]) -> config_pb.ModelConfig:
    """How `worker` is served, as Triton writes it; the first of `loaded` is the active version."""
    most = worker.queue.policy.max_batch
    batches = most > 1
    return config_pb.ModelConfig(
        name=worker.model,
        platform=_platform(worker),
        backend=worker.runtime,
        runtime=worker.runtime,
        version_policy=_version_policy(loaded),
        max_batch_size=most if batches else 0,
        input=[
            config_pb.ModelInput(
                name=spec.name, data_type=data_type(spec.datatype), dims=spec.shape[batches:]
            )
            for spec in worker.inputs
        ],
        output=[
            config_pb.ModelOutput(
                name=spec.name, data_type=data_type(spec.datatype), dims=spec.shape[batches:]
            )
            for spec in worker.outputs
        ],
        optimization=_optimization(worker),
        dynamic_batching=_batching(worker.queue.policy) if batches else None,
        instance_group=[
            config_pb.ModelInstanceGroup(
                name=f"{worker.model}_0",
                kind=config_pb.ModelInstanceGroup.KIND_CPU
                if worker.accelerator in _ON_PROCESSORS
                else config_pb.ModelInstanceGroup.KIND_GPU,
                count=worker.spec.instances,
            )
        ],
        default_model_filename=worker.spec.path.name,
        parameters={
            name: config_pb.ModelParameter(string_value=text) for name, text in _parameters(worker).items()
        },
        model_warmup=[_warm_up(worker.inputs, batches=batches)],
        response_cache=config_pb.ModelResponseCache(enable=worker.cache_s > 0),
        model_transaction_policy=config_pb.ModelTransactionPolicy(decoupled=False),
    )


def _version_policy(loaded: Sequence[Worker]) -> config_pb.ModelVersionPolicy:
    kind = config_pb.ModelVersionPolicy
    policy = loaded[0].versions
    if policy is None:
        return kind(specific=kind.Specific(versions=_versions(loaded)))
    if policy.every:
        return kind(all=kind.All())
    if policy.latest:
        return kind(latest=kind.Latest(num_versions=policy.latest))
    return kind(specific=kind.Specific(versions=policy.specific))


def _optimization(worker: Worker) -> config_pb.ModelOptimizationPolicy | None:
    kind = config_pb.ModelOptimizationPolicy
    level = _GRAPH_LEVELS[worker.spec.optimization]
    graph = kind.Graph(level=level) if worker.spec.format == ONNX else None
    name = worker.accelerator
    if worker.spec.format == TFLITE and worker.spec.xnnpack:
        name = "xnnpack"
    accelerators = None
    if name != CPU:
        one = [kind.ExecutionAccelerators.Accelerator(name=name)]
        on_processors = name in _ON_PROCESSORS
        accelerators = kind.ExecutionAccelerators(
            cpu_execution_accelerator=one if on_processors else [],
            gpu_execution_accelerator=[] if on_processors else one,
        )
    if graph is None and accelerators is None:
        return None
    return kind(graph=graph, execution_accelerators=accelerators)


def _parameters(worker: Worker) -> dict[str, str]:
    found = {"threads": str(worker.spec.threads), "accelerator": worker.accelerator}
    if worker.cascade is not None:
        found["cascade_to"] = worker.cascade.to
        found["cascade_threshold"] = f"{worker.cascade.threshold:g}"
    return found


def _warm_up(inputs: Sequence[TensorSpec], *, batches: bool) -> config_pb.ModelWarmup:
    """As golden.warm_up does it."""
    return config_pb.ModelWarmup(
        name="zeros",
        batch_size=1,
        count=1,
        inputs={
            spec.name: config_pb.ModelWarmup.Input(
                data_type=data_type(spec.datatype),
                dims=[1 if size < 0 else size for size in spec.shape[batches:]],
                zero_data=True,
            )
            for spec in inputs
        },
    )


def statistics(workers: Sequence[Worker]) -> pb.ModelStatisticsResponse:
    """The figures of these workers' versions, in their order."""
    return pb.ModelStatisticsResponse(model_stats=[_statistics(worker) for worker in workers])


def data_type(datatype: str) -> config_pb.DataType.ValueType:
    """Triton's number of one of the protocol's datatypes."""
    return config_pb.DataType.Value("TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}")


def _batching(policy: Policy) -> config_pb.ModelDynamicBatching:
    return config_pb.ModelDynamicBatching(
        preferred_batch_size=policy.preferred,
        max_queue_delay_microseconds=int(policy.window_s * 1_000_000),
        priority_levels=len(Priority),
        default_priority_level=Priority.NORMAL,
        default_queue_policy=config_pb.ModelQueuePolicy(
            timeout_action=config_pb.ModelQueuePolicy.REJECT,
            allow_timeout_override=True,
            max_queue_size=policy.queue,
        ),
    )


def _statistics(worker: Worker) -> pb.ModelStatistics:
    found = worker.figures.snapshot()
    return pb.ModelStatistics(
        name=worker.model,
        version=str(worker.version),
        last_inference=found.last_ms,
        inference_count=found.samples,
        execution_count=found.executions,
        inference_stats=pb.InferStatistics(
            success=_duration(found.success),
            fail=_duration(found.fail),
            queue=_duration(found.parts.queue),
            compute_input=_duration(found.parts.input),
            compute_infer=_duration(found.parts.infer),
            compute_output=_duration(found.parts.output),
            cache_hit=_duration(found.hits),
            cache_miss=_duration(found.misses),
        ),
        batch_stats=[_batch(size, parts) for size, parts in found.batches],
        memory_usage=[pb.MemoryUsage(type="CPU", id=0, byte_size=worker.resident_bytes())],
        response_stats=_cascade(found.cascade),
    )


def _cascade(counts: CascadeCounts | None) -> dict[str, pb.InferResponseStatistics]:
    """Samples by what became of them."""
    if counts is None:
        return {}
    return {
        "kept": pb.InferResponseStatistics(success=pb.StatisticDuration(count=counts.kept)),
        "escalated": pb.InferResponseStatistics(
            success=pb.StatisticDuration(count=counts.escalated),
            fail=pb.StatisticDuration(count=counts.failed),
        ),
    }


def _batch(size: int, parts: Parts) -> pb.InferBatchStatistics:
    return pb.InferBatchStatistics(
        batch_size=size,
        compute_input=_duration(parts.input),
        compute_infer=_duration(parts.infer),
        compute_output=_duration(parts.output),
    )


def _duration(total: Sum) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=int(total.seconds * _NANOSECONDS))


def _versions(loaded: Iterable[Worker]) -> list[int]:
    return sorted({worker.version for worker in loaded if worker.alive})


def _platform(worker: Worker) -> str:
    return f"{worker.runtime}_{worker.spec.format}"


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
