"""Which base is tried for a file."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleet.bases import Target, choose_bases
from fleet.catalog import Held
from fleet.limits import CANDIDATES_PER_FILE

TARGET = Target("target", 100_000, "digits", 5, "onnx", "model.onnx", "model")


def held(digest: str, **fields: object) -> Held:
    values = {
        "size": 100_000,
        "model": "digits",
        "version": 4,
        "variant": "onnx",
        "path": "model.onnx",
        "role": "model",
        "format": "onnx",
        **fields,
    }
    return Held(digest, **values)  # type: ignore[arg-type]


def test_the_same_file_of_the_previous_version_comes_first() -> None:
    box = [
        held("other model", model="letters"),
        held("other variant", variant="tflite"),
        held("older", version=2),
        held("previous", version=4),
        held("newer", version=6),
    ]
    assert choose_bases(TARGET, box, ()) == ("previous", "older")
    assert choose_bases(TARGET, box[:2], ()) == ("other variant", "other model")
    assert choose_bases(TARGET, [box[4], box[1]], ()) == ("newer", "other variant")


def test_the_devices_order_decides_among_equals() -> None:
    box = [held("a", model="letters"), held("b", model="letters")]
    assert choose_bases(TARGET, box, ["b", "a"]) == ("b", "a")


def test_weights_come_from_weights_and_labels_from_labels() -> None:
    labels = Target("target", 100_000, "digits", 5, "onnx", "labels.txt", "labels")
    box = [held("weights"), held("labels", path="labels.txt", role="labels"), held("data", role="external")]
    assert choose_bases(labels, box, ()) == ("labels",)
    assert choose_bases(TARGET, box, ()) == ("weights", "data")


def test_small_files_and_the_file_itself_need_no_base() -> None:
    small = Target("target", 4095, "digits", 5, "onnx", "model.onnx", "model")
    assert choose_bases(small, [held("base")], ()) == ()
    assert choose_bases(TARGET, [held("target"), held("empty", size=0)], ()) == ()


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9), st.sampled_from(["onnx", "tflite"]))))
def test_the_choice_does_not_depend_on_the_order_of_rows(rows: list[tuple[str, int, str]]) -> None:
    box = [held(digest, version=version, variant=variant) for digest, version, variant in rows]
    order = sorted({digest for digest, _, _ in rows})
    chosen = choose_bases(TARGET, box, order)
    assert chosen == choose_bases(TARGET, box[::-1], order)
    assert len(set(chosen)) == len(chosen) <= CANDIDATES_PER_FILE
