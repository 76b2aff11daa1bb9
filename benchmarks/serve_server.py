"""Our front and the bare server for benchmarks.serve, each as a process of its own.

    python -m benchmarks.serve_server ours|bare THREADS NAME=MODEL.onnx[,alone] ...

prints the address that it listens on and serves until its standard input ends; requests of a model with
",alone" are not put together. `ours` is the agent's inference front over a worker process for each model,
checked and queued as an activation does it. `bare` is the least that can be written with grpcio: a
synchronous server, stock protobuf, ONNX Runtime in the same process.
"""

from __future__ import annotations

import sys
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import onnxruntime

from agent.batch_proof import batches_are_safe
from agent.inference import InferenceServer
from agent.limits import MAX_MESSAGE_BYTES
from agent.options import read
from agent.router import Router
from agent.worker import Worker
from agent.worker_spec import WorkerSpec
from inference import open_inference_pb2 as pb
from inference import open_inference_pb2_grpc as pb_grpc

LOAD_S = 60.0
BARE_THREADS = 8
ALONE = ",alone"
COSINE_MIN = 0.95  # of an answer in a batch to the answer alone: int8 weights move with the batch
DTYPES = {"FP32": np.float32, "INT64": np.int64}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Bare(pb_grpc.GRPCInferenceServiceServicer):
    def __init__(self, models: dict[str, str], threads: int) -> None:
        self.sessions = {name: session(Path(path), threads) for name, path in models.items()}

    def ModelInfer(self, request, context):  # noqa: ARG002, N802 - gRPC's names
        inputs = {
            tensor.name: np.frombuffer(raw, DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        (y,) = self.sessions[request.model_name].run(None, inputs)
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id, raw_output_contents=[y.tobytes()]
        )
        response.outputs.add(name="y", datatype="FP32", shape=y.shape)
        return response


def serve_bare(models: dict[str, str], threads: int) -> None:
    server = grpc.server(
        futures.ThreadPoolExecutor(BARE_THREADS),
        options=(("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),),
    )
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(Bare(models, threads), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(0)


def serve_ours(models: dict[str, str], threads: int) -> None:
    router = Router()
    for name, file in models.items():
        options = {"batch": "off"} if file.endswith(ALONE) else {"batch_cosine": str(COSINE_MIN)}
        path = Path(file.removesuffix(ALONE))
        worker = Worker.start(WorkerSpec(name, 1, path, "onnx", threads=threads), LOAD_S)
        policy = read(options, threads).policy
        why_not = batches_are_safe(worker, None, LOAD_S, policy.cosine_min)
        if why_not:
            raise RuntimeError(why_not)
        worker.queue.policy = policy
        worker.checked()
        router.activate(name, 1, worker)
    server = InferenceServer(router, "127.0.0.1:0")
    server.start()
    print(server.addresses[0], flush=True)
    sys.stdin.read()
    server.stop(0)
    for serving in router.models():
        serving.active.close(0)


def main() -> None:
    kind, threads, *given = sys.argv[1:]
    models = {name: path for name, _, path in (item.partition("=") for item in given)}
    {"ours": serve_ours, "bare": serve_bare}[kind](models, int(threads))


if __name__ == "__main__":
    main()
