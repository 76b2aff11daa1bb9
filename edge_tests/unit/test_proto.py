"""The wire contract's own rules: everything is commented, enums named one way, numbers never reused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
OURS = "sluice.api.v1"
# Its values go over the wire by name, as google.rpc.ErrorInfo's reason, and in ranges by topic.
REASONS = "ErrorReason"
Element = tuple[str, tuple[int, ...]]  # full name; path in SourceCodeInfo, see descriptor.proto


def compiled(root: Path, out: Path) -> list[FileDescriptorProto]:
    """Every .proto below `root` as protoc understands it, with comments."""
    sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    assert sources, f"no .proto below {root}"
    options = [f"--proto_path={root}", f"--proto_path={WELL_KNOWN}", "--include_source_info"]
    assert protoc.main(["protoc", *options, f"--descriptor_set_out={out}", *sources]) == 0
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def message_elements(message: DescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[Element]:
    if message.options.map_entry:  # made by protoc, not written
        return
    yield name, path
    for index, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, 2, index)
    for index, nested in enumerate(message.nested_type):
        yield from message_elements(nested, f"{name}.{nested.name}", (*path, 3, index))
    for index, enum in enumerate(message.enum_type):
        yield from enum_elements(enum, f"{name}.{enum.name}", (*path, 4, index))
    for index, oneof in enumerate(message.oneof_decl):
        members = [field for field in message.field if field.HasField("oneof_index")]
        if not any(field.proto3_optional for field in members if field.oneof_index == index):
            yield f"{name}.{oneof.name}", (*path, 8, index)


def enum_elements(enum: EnumDescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[Element]:
    yield name, path
    for index, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, 2, index)


def elements(file: FileDescriptorProto) -> Iterator[Element]:
    """Everything in a file that a reader needs explained."""
    for index, message in enumerate(file.message_type):
        yield from message_elements(message, f"{file.package}.{message.name}", (4, index))
    for index, enum in enumerate(file.enum_type):
        yield from enum_elements(enum, f"{file.package}.{enum.name}", (5, index))
    for index, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield name, (6, index)
        for place, method in enumerate(service.method):
            yield f"{name}.{method.name}", (6, index, 2, place)


def uncommented(files: Iterable[FileDescriptorProto]) -> list[str]:
    """Names of what has neither a leading nor a trailing comment."""
    silent = []
    for file in files:
        commented = {
            tuple(place.path)
            for place in file.source_code_info.location
            if (place.leading_comments + place.trailing_comments).strip()
        }
        silent += [name for name, path in elements(file) if path not in commented]
    return silent


def messages(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
    waiting = [(f"{file.package}.{message.name}", message) for message in file.message_type]
    while waiting:
        name, message = waiting.pop()
        yield name, message
        waiting += [(f"{name}.{nested.name}", nested) for nested in message.nested_type]


def enums(file: FileDescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto]]:
    yield from ((f"{file.package}.{enum.name}", enum) for enum in file.enum_type)
    for name, message in messages(file):
        yield from ((f"{name}.{enum.name}", enum) for enum in message.enum_type)


def misnamed(files: Iterable[FileDescriptorProto]) -> list[str]:
    """Enum values that do not begin with their enum's name, and zeros that mean something."""
    wrong = []
    for file in files:
        for name, enum in enums(file):
            prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
            wrong += [
                f"{name}.{value.name}"
                for value in enum.value
                if (value.number == 0 and value.name != f"{prefix}_UNSPECIFIED")
                or (enum.name != REASONS and not value.name.startswith(f"{prefix}_"))
            ]
    return wrong


def given_up(files: Iterable[FileDescriptorProto]) -> list[str]:
    """Numbers below the highest of a message or enum that are neither in use nor reserved.

    A number that was in use once must be reserved, or the next field to take it reads old bytes as its own.
    """
    free = []
    for file in files:
        for name, message in messages(file):
            used = {field.number for field in message.field}
            # The end of a message's reserved range is exclusive, that of an enum's inclusive.
            reserved = {n for each in message.reserved_range for n in range(each.start, each.end)}
            free += [f"{name} = {n}" for n in range(1, max(used, default=0)) if n not in used | reserved]
        for name, enum in enums(file):
            used = {value.number for value in enum.value}
            reserved = {n for each in enum.reserved_range for n in range(each.start, each.end + 1)}
            if enum.name != REASONS:
                free += [f"{name} = {n}" for n in range(max(used)) if n not in used | reserved]
    return free


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    return compiled(PROTO, tmp_path_factory.mktemp("proto") / "all.bin")


def test_everything_is_commented(files: list[FileDescriptorProto]) -> None:
    silent = uncommented(files)
    assert not silent, f"{len(silent)} without a comment (unit, limit, what empty means): {silent}"


def test_enum_values_say_whose_they_are(files: list[FileDescriptorProto]) -> None:
    assert not misnamed(file for file in files if file.package == OURS)


def test_numbers_out_of_use_are_reserved(files: list[FileDescriptorProto]) -> None:
    assert not given_up(file for file in files if file.package == OURS)


def test_the_rules_find_what_breaks_them(tmp_path: Path) -> None:
    (tmp_path / "bad.proto").write_text(
        """
        // About the file.
        syntax = "proto3";
        package bad;
        service Service {
          rpc Method(Message) returns (Message);
        }
        // A message.
        message Message {
          message Inner {}
          reserved 2;
          map<string, uint64> counts = 1;
          // A choice.
          oneof choice {
            bool yes = 3;  // A choice taken.
            //
            bool no = 5;
          }
          enum Mood {
            MOOD_GOOD = 0;
            BAD = 2;
          }
        }
        """,
        "utf-8",
    )
    files = compiled(tmp_path, tmp_path / "bad.bin")
    assert sorted(uncommented(files)) == [
        "bad.Message.Inner",
        "bad.Message.Mood",
        "bad.Message.Mood.BAD",
        "bad.Message.Mood.MOOD_GOOD",
        "bad.Message.counts",
        "bad.Message.no",
        "bad.Service",
        "bad.Service.Method",
    ]
    assert misnamed(files) == ["bad.Message.Mood.MOOD_GOOD", "bad.Message.Mood.BAD"]
    assert given_up(files) == ["bad.Message = 4", "bad.Message.Mood = 1"]
