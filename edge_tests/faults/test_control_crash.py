"""The control plane is killed at bad moments: uploads resume, deltas come back, nothing half-done shows."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.operator import Operator, eventually, manifest, onnx_model
from sluice.api.v1 import registry_pb2
from updater.digests import digest_bytes


def test_an_upload_goes_on_after_the_control_plane_was_killed(tmp_path: Path) -> None:
    data = onnx_model(1) * 20
    go_on = threading.Event()

    def parts():  # type: ignore[no-untyped-def]
        header = registry_pb2.UploadHeader(digest=digest_bytes(data), size=len(data))
        yield registry_pb2.UploadFileRequest(header=header)
        yield registry_pb2.UploadFileRequest(chunk=data[:500_000])
        go_on.wait(60)

    with ControlPlane(tmp_path / "control", "--disk-reserve-bytes", "0") as control:
        with Operator(control.address) as operator:
            call = operator.registry.UploadFile.future(parts())
            question = registry_pb2.GetUploadRequest(digest=digest_bytes(data))
            eventually(
                lambda: operator.registry.GetUpload(question).committed_bytes == 500_000, "the first bytes"
            )
            control.kill()
            go_on.set()
            assert isinstance(call.exception(), grpc.RpcError)
        control.start()
        with Operator(control.address) as operator:
            held = operator.registry.GetUpload(question)
            assert (held.committed_bytes, held.complete) == (500_000, False)
            operator.upload(data, offset=held.committed_bytes)
            assert operator.registry.GetUpload(question).complete


def test_an_upload_whose_client_leaves_keeps_its_bytes_and_frees_the_file(tmp_path: Path) -> None:
    data = onnx_model(1) * 20
    with ControlPlane(tmp_path / "control", "--disk-reserve-bytes", "0") as control:
        leave = threading.Event()

        def parts():  # type: ignore[no-untyped-def]
            header = registry_pb2.UploadHeader(digest=digest_bytes(data), size=len(data))
            yield registry_pb2.UploadFileRequest(header=header)
            yield registry_pb2.UploadFileRequest(chunk=data[:500_000])
            leave.wait(60)

        question = registry_pb2.GetUploadRequest(digest=digest_bytes(data))
        with Operator(control.address) as operator:
            call = operator.registry.UploadFile.future(parts())
            eventually(
                lambda: operator.registry.GetUpload(question).committed_bytes == 500_000, "the first bytes"
            )
            call.cancel()
            leave.set()

            def resumed() -> bool:
                try:
                    operator.upload(data, offset=500_000)
                except grpc.RpcError as error:  # the server has not yet seen the client leave
                    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
                    return False
                return True

            eventually(resumed, "the upload to go on")
            assert operator.registry.GetUpload(question).complete


def test_a_lost_delta_file_is_built_again(tmp_path: Path) -> None:
    old, new = onnx_model(1), onnx_model(1, drift=1e-3)
    with ControlPlane(tmp_path / "control", "--disk-reserve-bytes", "0") as control:
        with Operator(control.address) as operator:
            operator.push("digits", 1, old)
            operator.push("digits", 2, new)
            offer = operator.plan("digits", 2, [digest_bytes(old)]).files[0].delta
        control.kill()
        name = offer.digest.removeprefix("sha256:")
        (control.data / "deltas" / "objects" / name[:2] / name[2:]).unlink()
        control.start()
        with Operator(control.address) as operator:
            again = operator.plan("digits", 2, [digest_bytes(old)]).files[0].delta
            operator.fetch(again.digest, tmp_path / "delta")
            assert (tmp_path / "delta").stat().st_size == again.size


def test_files_without_their_manifest_show_nothing_after_a_kill(tmp_path: Path) -> None:
    model = onnx_model(1)
    with ControlPlane(tmp_path / "control", "--disk-reserve-bytes", "0") as control:
        with Operator(control.address) as operator:
            operator.upload(model)
        control.kill()
        control.start()
        with Operator(control.address) as operator:
            assert not operator.registry.ListModels(registry_pb2.ListModelsRequest()).models
            assert operator.publish(manifest("digits", 1, model)).created
