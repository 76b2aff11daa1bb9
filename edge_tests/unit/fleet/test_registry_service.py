"""Uploads, publication, versions and aliases, over gRPC."""

from __future__ import annotations

import grpc
import pytest

from edge_tests.harness.control import ControlPlane
from edge_tests.harness.models import tiny_tflite
from edge_tests.harness.operator import Operator, failing, manifest, onnx_model
from sluice.api.v1 import registry_pb2
from updater.digests import digest_bytes


def get_upload(operator: Operator, data: bytes) -> tuple[int, bool]:
    answer = operator.registry.GetUpload(registry_pb2.GetUploadRequest(digest=digest_bytes(data)))
    return answer.committed_bytes, answer.complete


def test_an_upload_goes_on_where_it_stopped(operator: Operator) -> None:
    data = onnx_model(1)
    assert operator.upload(data, end=20_000).committed_bytes == 20_000
    assert get_upload(operator, data) == (20_000, False)
    answer = operator.upload(data, offset=20_000)
    assert (answer.digest, answer.committed_bytes) == (digest_bytes(data), len(data))
    assert get_upload(operator, data) == (len(data), True)


def test_an_upload_of_a_file_that_is_there_takes_nothing(operator: Operator) -> None:
    data = onnx_model(1)
    operator.upload(data)
    assert operator.upload(data).committed_bytes == len(data)


@pytest.mark.parametrize("offset", [0, 19_999, 20_001])
def test_an_upload_that_starts_elsewhere_is_told_where(operator: Operator, offset: int) -> None:
    data = onnx_model(1)
    operator.upload(data, end=20_000)
    error = failing(lambda: operator.upload(data, offset=offset))
    assert error.code == "REQUEST_INVALID"
    assert "20000" in error.hint
    assert get_upload(operator, data) == (20_000, False)


def test_bytes_with_another_digest_are_dropped(operator: Operator) -> None:
    data = onnx_model(1)
    wrong = data[:-1] + bytes([data[-1] ^ 1])
    error = failing(lambda: operator.upload(wrong, digest=digest_bytes(data)))
    assert error.code == "FILE_DIGEST_MISMATCH"
    assert get_upload(operator, data) == (0, False)
    operator.upload(data)
    assert get_upload(operator, data) == (len(data), True)


def upload_raw(operator: Operator, *requests: registry_pb2.UploadFileRequest) -> str:
    return failing(lambda: operator.registry.UploadFile(iter(requests))).code


def test_malformed_uploads_are_refused(operator: Operator) -> None:
    header = registry_pb2.UploadFileRequest(
        header=registry_pb2.UploadHeader(digest=digest_bytes(b"abc"), size=3)
    )
    huge = registry_pb2.UploadFileRequest(
        header=registry_pb2.UploadHeader(digest=digest_bytes(b"abc"), size=(16 << 30) + 1)
    )
    nameless = registry_pb2.UploadFileRequest(header=registry_pb2.UploadHeader(digest="sha256:xyz", size=3))
    chunk = registry_pb2.UploadFileRequest(chunk=b"abc")
    long = registry_pb2.UploadFileRequest(chunk=bytes((1 << 20) + 1))
    assert upload_raw(operator) == "REQUEST_INVALID"
    assert upload_raw(operator, chunk) == "REQUEST_INVALID"
    assert upload_raw(operator, header, header) == "REQUEST_INVALID"
    assert upload_raw(operator, header, chunk, chunk) == "REQUEST_INVALID"
    assert upload_raw(operator, header, long) in ("LIMIT_EXCEEDED", "REQUEST_INVALID")
    assert upload_raw(operator, nameless) == "REQUEST_INVALID"
    assert upload_raw(operator, huge) == "LIMIT_EXCEEDED"


def test_a_second_upload_of_the_same_file_at_once_is_refused(operator: Operator) -> None:
    data = onnx_model(1)
    seconds: list[str] = []

    def parts():  # type: ignore[no-untyped-def]
        header = registry_pb2.UploadHeader(digest=digest_bytes(data), size=len(data))
        yield registry_pb2.UploadFileRequest(header=header)
        yield registry_pb2.UploadFileRequest(chunk=data[:1000])
        while get_upload(operator, data)[0] < 1000:
            pass
        seconds.append(failing(lambda: operator.upload(data, offset=1000)).code)
        yield registry_pb2.UploadFileRequest(chunk=data[1000:])

    answer = operator.registry.UploadFile(parts(), timeout=60)
    assert seconds == ["STATE_LOCKED"]
    assert answer.committed_bytes == len(data)


def test_an_upload_that_would_eat_the_reserve_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with (
        ControlPlane(tmp_path / "full", "--disk-reserve-bytes", str(1 << 60)) as control,
        Operator(control.address) as operator,
    ):
        error = failing(lambda: operator.upload(onnx_model(1)))
        assert error.code == "DISK_FULL"
        assert "reserve" in error.message
        assert get_upload(operator, onnx_model(1)) == (0, False)


def test_a_published_version_can_be_read_back(operator: Operator) -> None:
    model = onnx_model(1)
    wanted = operator.push("digits", 1, model)
    found = operator.registry.GetVersion(registry_pb2.GetVersionRequest(model="digits"))
    assert found.manifest == wanted.to_bytes()
    assert (found.version, found.manifest_digest, found.size_bytes) == (1, wanted.digest, len(model))
    assert list(found.variants) == ["default"]
    assert operator.registry.GetModel(registry_pb2.GetModelRequest(name="digits")).latest_version == 1


def test_the_same_version_twice_makes_nothing_new(operator: Operator) -> None:
    wanted = operator.push("digits", 1, onnx_model(1))
    again = operator.publish(wanted)
    assert not again.created
    assert again.version.version == 1


def test_the_latest_content_as_the_next_version_makes_nothing_new(operator: Operator) -> None:
    operator.push("digits", 1, onnx_model(1))
    again = operator.publish(manifest("digits", 2, onnx_model(1)))
    assert (again.created, again.version.version) == (False, 1)
    assert operator.registry.GetModel(registry_pb2.GetModelRequest(name="digits")).latest_version == 1


def test_an_older_content_is_a_new_version(operator: Operator) -> None:
    operator.push("digits", 1, onnx_model(1))
    operator.push("digits", 2, onnx_model(2))
    assert operator.publish(manifest("digits", 3, onnx_model(1))).created


@pytest.mark.parametrize("number", [3, 100])
def test_a_number_that_is_not_the_next_is_refused(operator: Operator, number: int) -> None:
    operator.push("digits", 1, onnx_model(1))
    operator.upload(onnx_model(2))
    error = failing(lambda: operator.publish(manifest("digits", number, onnx_model(2))))
    assert error.code == "VERSION_NOT_NEXT"
    assert "version 2" in error.hint


def test_a_number_that_has_other_content_is_a_conflict(operator: Operator) -> None:
    operator.push("digits", 1, onnx_model(1))
    operator.upload(onnx_model(2))
    error = failing(lambda: operator.publish(manifest("digits", 1, onnx_model(2))))
    assert error.code == "VERSION_CONFLICT"


def test_a_version_with_missing_files_names_them_and_stays_invisible(operator: Operator) -> None:
    model = onnx_model(1)
    error = failing(lambda: operator.publish(manifest("digits", 1, model)))
    assert error.code == "FILE_UNKNOWN"
    assert digest_bytes(model) in error.message
    request = registry_pb2.GetModelRequest(name="digits")
    assert failing(lambda: operator.registry.GetModel(request)).code == "MODEL_UNKNOWN"
    assert not operator.registry.ListModels(registry_pb2.ListModelsRequest()).models


def test_a_truncated_model_file_is_refused(operator: Operator) -> None:
    model = onnx_model(1)[:-1000]
    operator.upload(model)
    error = failing(lambda: operator.publish(manifest("digits", 1, model)))
    assert error.code == "MODEL_FILE_TRUNCATED"
    assert "model.onnx" in error.message


@pytest.mark.parametrize("stated", ["onnx", "tflite"])
def test_a_foreign_model_file_is_refused_with_what_it_looks_like(
    operator: Operator, stated: str, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    foreign = tiny_tflite(tmp_path / "m.tflite").read_bytes() if stated == "onnx" else onnx_model(1)
    operator.upload(foreign)
    error = failing(lambda: operator.publish(manifest("digits", 1, foreign, model_format=stated)))
    assert error.code == "MODEL_FILE_INVALID"
    assert ("looks like tflite" if stated == "onnx" else "looks like onnx") in error.message


def test_noise_is_no_model_file(operator: Operator) -> None:
    noise = b"not a model at all" * 100
    operator.upload(noise)
    error = failing(lambda: operator.publish(manifest("digits", 1, noise)))
    assert error.code == "MODEL_FILE_INVALID"


def test_a_manifest_that_lies_about_a_size_is_refused(operator: Operator) -> None:
    model = onnx_model(1)
    operator.upload(model)
    data = manifest("digits", 1, model).to_bytes().replace(b'"size":', b'"size":1')
    request = registry_pb2.PublishVersionRequest(manifest=data)
    assert failing(lambda: operator.registry.PublishVersion(request)).code == "MANIFEST_INVALID"


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b'{"model": "digits"}'])
def test_a_malformed_manifest_is_refused(operator: Operator, data: bytes) -> None:
    request = registry_pb2.PublishVersionRequest(manifest=data)
    assert failing(lambda: operator.registry.PublishVersion(request)).code == "MANIFEST_INVALID"


def test_a_message_over_the_limit_is_refused(operator: Operator) -> None:
    request = registry_pb2.PublishVersionRequest(manifest=bytes(3 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        operator.registry.PublishVersion(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unknown_models_versions_and_aliases_have_their_codes(operator: Operator) -> None:
    operator.push("digits", 1, onnx_model(1))

    def code(**which: object) -> str:
        return failing(
            lambda: operator.registry.GetVersion(registry_pb2.GetVersionRequest(**which))  # type: ignore[arg-type]
        ).code

    assert code(model="letters") == "MODEL_UNKNOWN"
    for version in (2, 1 << 63, (1 << 64) - 1):
        assert code(model="digits", version=version) == "VERSION_UNKNOWN"
    assert code(model="digits", alias="stable") == "ALIAS_UNKNOWN"
    assert code(model="letters", alias="stable") == "MODEL_UNKNOWN"


def test_an_alias_points_at_a_version_until_it_is_removed(operator: Operator) -> None:
    for number in (1, 2):
        operator.push("digits", number, onnx_model(number))

    def point(number: int, alias: str = "stable") -> dict[str, int]:
        request = registry_pb2.SetAliasRequest(model="digits", alias=alias, version=number)
        return dict(operator.registry.SetAlias(request).aliases)

    assert point(2) == {"stable": 2}
    assert point(1) == {"stable": 1}
    by_alias = registry_pb2.GetVersionRequest(model="digits", alias="stable")
    assert operator.registry.GetVersion(by_alias).version == 1
    assert point(0) == {}
    assert failing(lambda: point(3)).code == "VERSION_UNKNOWN"
    assert failing(lambda: point(1, "No Alias")).code == "REQUEST_INVALID"
    for index in range(32):
        point(1, f"a{index}")
    assert failing(lambda: point(1, "one-more")).code == "LIMIT_EXCEEDED"


def test_lists_come_in_pages(operator: Operator) -> None:
    for number in range(1, 6):
        operator.push("digits", number, onnx_model(number))
    operator.push("letters", 1, onnx_model(1))
    numbers, token = [], ""
    while True:
        request = registry_pb2.ListVersionsRequest(model="digits", page_size=2, page_token=token)
        page = operator.registry.ListVersions(request)
        assert all(not version.manifest for version in page.versions)
        numbers += [version.version for version in page.versions]
        token = page.next_page_token
        if not token:
            break
    assert numbers == [5, 4, 3, 2, 1]
    first = operator.registry.ListModels(registry_pb2.ListModelsRequest(page_size=1))
    second = operator.registry.ListModels(
        registry_pb2.ListModelsRequest(page_size=1, page_token=first.next_page_token)
    )
    assert [model.name for model in (*first.models, *second.models)] == ["digits", "letters"]
    assert not second.next_page_token
    bad = registry_pb2.ListVersionsRequest(model="digits", page_token="x")
    assert failing(lambda: operator.registry.ListVersions(bad)).code == "REQUEST_INVALID"
    big = registry_pb2.ListModelsRequest(page_size=1001)
    assert failing(lambda: operator.registry.ListModels(big)).code == "LIMIT_EXCEEDED"


def test_what_was_published_is_there_after_a_restart(control: ControlPlane) -> None:
    with Operator(control.address) as operator:
        wanted = operator.push("digits", 1, onnx_model(1))
        operator.upload(onnx_model(2), end=10_000)
    control.restart()
    with Operator(control.address) as operator:
        found = operator.registry.GetVersion(registry_pb2.GetVersionRequest(model="digits", version=1))
        assert found.manifest == wanted.to_bytes()
        assert get_upload(operator, onnx_model(2)) == (10_000, False)
