from __future__ import annotations

from pathlib import Path

import pytest

from agent import version_directory
from agent.recovery import recover
from agent.retention import collect, surplus
from agent.slots import Installed, Slots
from agent.version_directory import materialise, verify
from sluice.api.v1 import errors_pb2
from updater.digests import digest_bytes
from updater.errors import SluiceError
from updater.manifest import File, Manifest, Variant
from updater.store import Store


class Box:
    """A store and a slots directory, and versions put into them."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root / "store")
        self.slots_dir = root / "slots"
        self.slots_dir.mkdir()

    def add(self, version: int, **contents: bytes) -> tuple[Installed, Variant]:
        """Stores a version with these files and builds its directory."""
        contents = contents or {"model": b"weights %d" % version}
        files = tuple(
            File(f"{role}.bin", "model" if role == "model" else "external", digest_bytes(data), len(data))
            for role, data in contents.items()
        )
        for data in contents.values():
            self.store.add_bytes(data)
        manifest = Manifest("m", version, (Variant("onnx", "onnx", files),))
        digest = self.store.add_bytes(manifest.to_bytes())
        installed = Installed(version, digest, "onnx", "onnxruntime")
        materialise(self.store, self.slots_dir, "m", installed, manifest.variants[0])
        return installed, manifest.variants[0]

    def directory(self, version: int) -> Path:
        return self.slots_dir / "m" / str(version)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_files_lie_beside_each_other_under_their_names(box: Box) -> None:
    installed, variant = box.add(1, model=b"graph", external=b"data")
    assert (box.directory(1) / "model.bin").read_bytes() == b"graph"
    assert (box.directory(1) / "external.bin").samefile(box.store.path(digest_bytes(b"data")))
    before = box.directory(1).stat().st_ino
    materialise(box.store, box.slots_dir, "m", installed, variant)
    assert box.directory(1).stat().st_ino == before
    (box.directory(1) / "external.bin").unlink()
    materialise(box.store, box.slots_dir, "m", installed, variant)
    assert (box.directory(1) / "external.bin").read_bytes() == b"data"
    assert not list(box.slots_dir.glob("*/.*"))


def test_verify_finds_damage_and_sets_it_aside(box: Box) -> None:
    _, variant = box.add(1)
    assert verify(box.directory(1), "m", 1, variant, box.store) == (variant.files[0].digest,)
    path = box.directory(1) / "model.bin"
    path.chmod(0o644)
    path.write_bytes(b"Weights 1")
    with pytest.raises(SluiceError) as caught:
        verify(box.directory(1), "m", 1, variant, box.store)
    assert caught.value.reason == errors_pb2.STORE_CORRUPT
    assert not box.store.has(variant.files[0].digest)
    path.unlink()
    with pytest.raises(SluiceError, match="has nothing"):
        verify(box.directory(1), "m", 1, variant, box.store)


def test_surplus_keeps_slots_and_the_newest() -> None:
    held = Installed(2, "d", "v", "r")
    models = {"m": Slots("m", active=held)}
    on_disk = {"m": [1, 2, 3, 4], "gone": [1, 7]}
    assert surplus(models, on_disk, 0) == [("gone", 1), ("gone", 7), ("m", 1), ("m", 3), ("m", 4)]
    assert surplus(models, on_disk, 1) == [("gone", 1), ("m", 1), ("m", 3)]
    assert surplus(models, on_disk, 9) == []


def test_collect_never_takes_what_a_slot_needs(box: Box) -> None:
    installed = {version: box.add(version) for version in (1, 2, 3, 4)}
    loose = box.store.add_bytes(b"nobody wants this")
    desired = Manifest("m", 5, (Variant("onnx", "onnx", (File("f", "model", digest_bytes(b"new"), 3),)),))
    wanted = [box.store.add_bytes(b"new"), box.store.add_bytes(desired.to_bytes())]
    models = {"m": Slots("m", active=installed[3][0], previous=installed[2][0])}
    kept, dropped = (
        box.store.staging(f"apply-{digest[7:]}.0123456789abcdef") for digest in (wanted[0], loose)
    )
    for partial in (kept, dropped):
        partial.write_bytes(b"part")
    collect(box.store, box.slots_dir, models, [desired.digest], 0)
    assert box.store.staged() == [kept]
    assert sorted(entry.name for entry in (box.slots_dir / "m").iterdir()) == ["2", "3"]
    for version, (item, variant) in installed.items():
        assert box.store.has(variant.files[0].digest) == (version in (2, 3))
        assert box.store.has(item.manifest_digest) == (version in (2, 3))
    assert not box.store.has(loose)
    assert all(box.store.has(digest) for digest in wanted)


def test_sweep_removes_only_unfinished_directories(box: Box) -> None:
    box.add(1)
    (box.slots_dir / "m" / ".2.abc.tmp").mkdir()
    box.store.staging("add-0123").write_bytes(b"half a copy")
    box.store.staging("apply-0123").write_bytes(b"resumed later")
    version_directory.sweep(box.slots_dir, box.store)
    assert [path.name for path in box.store.staged()] == ["apply-0123"]
    assert [entry.name for entry in (box.slots_dir / "m").iterdir()] == ["1"]


def test_recovery_takes_the_newest_sound_version(box: Box) -> None:
    one, two = box.add(1)[0], box.add(2)[0]
    box.add(3)
    damaged = box.directory(3) / "model.bin"
    damaged.chmod(0o644)
    damaged.write_bytes(b"?")
    (box.slots_dir / "m" / "4").mkdir()
    assert recover(box.store, box.slots_dir) == [Slots("m", active=two, previous=one)]
