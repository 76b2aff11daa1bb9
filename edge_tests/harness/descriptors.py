"""Compiled protobuf files as plain values, to compare ours with another's in another process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2


def describe(file: Any) -> dict[str, Any]:
    """Each field's number, type and label, each enum's values and each method's types, by full name."""
    whole = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(whole)
    found: dict[str, Any] = {}
    for message in whole.message_type:
        found.update(fields(message, f"{whole.package}.{message.name}"))
    for enum in whole.enum_type:
        found.update({f"{whole.package}.{enum.name}.{value.name}": value.number for value in enum.value})
    for service in whole.service:
        for method in service.method:
            streams = [method.client_streaming, method.server_streaming]
            found[f"{whole.package}.{service.name}.{method.name}"] = [
                method.input_type,
                method.output_type,
                *streams,
            ]
    return found


def fields(message: Any, name: str) -> Iterator[tuple[str, Any]]:
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        yield f"{name}.{field.name}", [field.number, field.type, field.label, field.type_name, oneof]
    for enum in message.enum_type:
        for value in enum.value:
            yield f"{name}.{enum.name}.{value.name}", value.number
    for nested in message.nested_type:
        yield from fields(nested, f"{name}.{nested.name}")
