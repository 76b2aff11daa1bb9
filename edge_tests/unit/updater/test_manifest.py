"""Manifests: one byte form, every rule named in its refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.api.v1 import errors_pb2
from updater import canonical
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.limits import MAX_MANIFEST_BYTES
from updater.manifest import Bounds, File, Manifest, Tolerance, Variant

MODEL = File("digits.onnx", "model", digest_bytes(b"model"), 5)
GOLDEN = File("golden.npz", "golden", digest_bytes(b"golden"), 6)
VARIANT = Variant("onnx-int8", "onnx", (MODEL, GOLDEN), precision="int8", options={"threads": "1"})
MANIFEST = Manifest("digits", 2, (VARIANT,), floor=1, annotations={"commit": "abc"})

# Final: a change here breaks every version ever published and signed.
CANONICAL = (
    '{"annotations":{"commit":"abc"},"floor":1,"model":"digits","schema":2,"variants":['
    '{"accelerator":"cpu","boards":[],"files":['
    '{"digest":"sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4",'
    '"path":"digits.onnx","role":"model","size":5},'
    '{"digest":"sha256:GOLDEN","path":"golden.npz","role":"golden","size":6}],"format":"onnx",'
    '"min_memory_bytes":0,"name":"onnx-int8","options":{"threads":"1"},"precision":"int8","runtime":"",'
    '"tolerance":{"cosine_min":"0.95","max_abs_error":"","max_relative_error":"0.35","outputs":{}}}],"version":2}'
).replace("sha256:GOLDEN", GOLDEN.digest)
SCHEMA_1 = CANONICAL.replace('"schema":2', '"schema":1').replace(
    ',"max_relative_error":"0.35","outputs":{}', ""
)


def value() -> dict[str, Any]:
    return json.loads(MANIFEST.to_bytes())


def refused(changed: Any) -> SluiceError:
    with pytest.raises(SluiceError) as caught:
        Manifest.parse(
            json.dumps(changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        )
    assert caught.value.reason == errors_pb2.MANIFEST_INVALID
    return caught.value


def test_round_trip_and_canonical_form() -> None:
    data = MANIFEST.to_bytes()
    assert Manifest.parse(data) == MANIFEST
    assert MANIFEST.digest == digest_bytes(data)


def test_canonical_bytes_are_final() -> None:
    assert MANIFEST.to_bytes().decode() == CANONICAL


def test_what_was_signed_under_schema_1_stays_as_it_is() -> None:
    manifest = Manifest.parse(SCHEMA_1.encode())
    assert manifest.variants[0].tolerance == Tolerance("0.95", "", "")
    assert manifest.to_bytes() == SCHEMA_1.encode()
    assert manifest.digest == digest_bytes(SCHEMA_1.encode())


@pytest.mark.parametrize(
    "bounds",
    [
        Tolerance("0.9", "", "0.1", {"boxes": Bounds("0.99", "", "0.01"), "scores": Bounds()}),
        Tolerance("0.9", "0.2", ""),
    ],
)
def test_bounds_of_single_outputs_survive(bounds: Tolerance) -> None:
    manifest = replace(MANIFEST, variants=(replace(VARIANT, tolerance=bounds),))
    read = Manifest.parse(manifest.to_bytes()).variants[0].tolerance
    assert read == bounds
    assert read.of("boxes") == bounds.outputs.get("boxes", bounds)


def test_a_schema_is_the_lowest_that_serves() -> None:
    lower = CANONICAL.replace('"max_relative_error":"0.35"', '"max_relative_error":""')
    with pytest.raises(SluiceError, match="nothing here needs more than 1"):
        Manifest.parse(lower.encode())


def test_content_digest_ignores_only_version_and_floor() -> None:
    assert replace(MANIFEST, version=9, floor=3).content_digest == MANIFEST.content_digest
    assert replace(MANIFEST, annotations={}).content_digest != MANIFEST.content_digest
    other = replace(VARIANT, tolerance=Tolerance("0.99"))
    assert replace(MANIFEST, variants=(other,)).content_digest != MANIFEST.content_digest


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("model", "Digits"),
        ("model", "../digits"),
        ("model", ""),
        ("version", 0),
        ("version", True),
        ("version", "2"),
        ("floor", 3),
        ("schema", 3),
        ("variants", []),
        ("annotations", {"a": 1}),
        ("annotations", []),
        ("variants.0.format", "pickle"),
        ("variants.0.accelerator", "tpu"),
        ("variants.0.min_memory_bytes", -1),
        ("variants.0.boards", "pi"),
        ("variants.0.tolerance.cosine_min", "high"),
        ("variants.0.tolerance.max_abs_error", "-1"),
        ("variants.0.tolerance.max_relative_error", "much"),
        ("variants.0.tolerance.outputs", ["y"]),
        ("variants.0.tolerance.outputs", {"y": {"cosine_min": "0.9", "max_abs_error": ""}}),
        ("variants.0.tolerance.outputs", {f"y{number}": {} for number in range(65)}),
        ("variants.0.files.0.digest", "sha256:00"),
        ("variants.0.files.0.digest", "sha1:" + "0" * 64),
        ("variants.0.files.0.size", 1 << 40),
        ("variants.0.files.0.path", "../../etc/passwd"),
        ("variants.0.files.0.path", "a/b"),
        ("variants.0.files.0.path", ".hidden"),
        ("variants.0.files.0.role", "virus"),
    ],
)
def test_each_rule_names_its_field(path: str, bad: object) -> None:
    changed = value()
    place: Any = changed
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    place[last] = bad
    error = refused(changed)
    assert str(last) in error.obj or str(last) in error.message


def test_missing_and_unknown_fields() -> None:
    for key in value():
        changed = value()
        del changed[key]
        assert f"$.{key}" in refused(changed).obj
    assert "$.extra" in refused(value() | {"extra": "x"}).obj


def test_files_and_variants_are_unique_and_models_single() -> None:
    assert "two entries" in refused(value() | {"variants": value()["variants"] * 2}).message
    for files, told in [
        ((MODEL, replace(GOLDEN, path=MODEL.path)), "two entries"),
        ((GOLDEN,), "0 files of role model"),
        ((MODEL, replace(GOLDEN, role="model")), "2 files of role model"),
        ((MODEL, GOLDEN, replace(GOLDEN, path="b.npz")), "more than one file of role golden"),
    ]:
        with pytest.raises(SluiceError, match=told):
            replace(MANIFEST, variants=(replace(VARIANT, files=files),)).to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"a":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1.5}',
        b'{"a":null}',
        b'{"a":NaN}',
        b"[" * 100_000,
        b'{"a":90071992547409930}',
    ],
)
def test_what_is_not_canonical_json_is_refused(data: bytes) -> None:
    with pytest.raises(SluiceError) as caught:
        Manifest.parse(data)
    assert caught.value.reason == errors_pb2.MANIFEST_INVALID


def test_size_is_checked_before_parsing() -> None:
    with pytest.raises(SluiceError, match="at most"):
        Manifest.parse(b" " * (MAX_MANIFEST_BYTES + 1))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_flipped_bytes_never_pass_as_the_same_version(position: int, flip: int) -> None:
    data = bytearray(MANIFEST.to_bytes())
    data[position % len(data)] ^= flip
    try:
        parsed = Manifest.parse(bytes(data))
    except SluiceError as error:
        assert error.reason == errors_pb2.MANIFEST_INVALID
    else:
        assert parsed != MANIFEST
        assert parsed.to_bytes() == bytes(data)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.booleans() | st.integers(-canonical.MAX_INTEGER, canonical.MAX_INTEGER) | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text("abc-_.", max_size=5), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_canonical_json_round_trips(item: Any) -> None:
    try:
        data = canonical.encode(item)
    except SluiceError as error:
        assert "Unicode" in error.message
        return
    assert canonical.decode(data, "value") == item
