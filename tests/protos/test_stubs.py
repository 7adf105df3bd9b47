"""The committed stubs are those of the committed schema, and a released schema only ever grows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from protos import generate
from protos.mekd.v1 import quota_ledger_pb2, teacher_inference_pb2

ROOT = Path(generate.__file__).resolve().parent.parent
RELEASED = ROOT / "tests/protos/released_v1.binpb"


def test_committed_stubs_and_descriptor_set_are_generated_from_the_committed_schema(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 7  # *_pb2.py, *_pb2.pyi, *_pb2_grpc.py of two files, and the descriptor set
    for path in made:
        assert (ROOT / path).read_bytes() == (tmp_path / path).read_bytes(), f"{path}: run python -m protos.generate"
    stubs = {path.relative_to(ROOT) for pattern in ("*_pb2*", "*.binpb") for path in (ROOT / "protos").rglob(pattern)}
    assert {path for path in stubs if "__pycache__" not in path.parts} == set(made)


# --- a released schema only ever grows ---


def read_set(data: bytes) -> dict[str, FileDescriptorProto]:
    return {file.name: file for file in FileDescriptorSet.FromString(data).file}


def messages_of(
    file: FileDescriptorProto,
) -> Iterator[tuple[str, DescriptorProto]]:
    def walk(prefix: str, message: DescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
        yield prefix + message.name, message
        for nested in message.nested_type:
            yield from walk(f"{prefix}{message.name}.", nested)

    for message in file.message_type:
        yield from walk("", message)


def enums_of(file: FileDescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto]]:
    for enum in file.enum_type:
        yield enum.name, enum
    for name, message in messages_of(file):
        for enum in message.enum_type:
            yield f"{name}.{enum.name}", enum


def breaking_changes(before: dict[str, FileDescriptorProto], after: dict[str, FileDescriptorProto]) -> list[str]:
    """What an agent built on ``before`` would misread in ``after``."""
    broken: list[str] = []
    for name, old_file in before.items():
        if name not in after:
            broken.append(f"file {name} removed")
            continue
        new_file = after[name]
        if old_file.package != new_file.package:
            broken.append(f"package {old_file.package} renamed")
        new_messages = dict(messages_of(new_file))
        for message_name, message in messages_of(old_file):
            if message_name not in new_messages:
                broken.append(f"message {message_name} removed")
                continue
            new_message = new_messages[message_name]
            new_fields = {field.number: field for field in new_message.field}
            for field in message.field:
                where = f"field {message_name}.{field.name}"
                now = new_fields.get(field.number)
                if now is None:
                    broken.append(f"{where} removed or renumbered")
                    continue
                if now.name != field.name:
                    broken.append(f"{where} renamed")
                if (now.type, now.type_name, now.label) != (field.type, field.type_name, field.label):
                    broken.append(f"{where} retyped")
                oneofs = [
                    side.oneof_decl[one.oneof_index].name if one.HasField("oneof_index") else ""
                    for side, one in ((message, field), (new_message, now))
                ]
                if oneofs[0] != oneofs[1]:
                    broken.append(f"{where} moved to another oneof")
        new_enums = dict(enums_of(new_file))
        for enum_name, enum in enums_of(old_file):
            now_values = (
                {value.number: value.name for value in new_enums[enum_name].value} if enum_name in new_enums else {}
            )
            for value in enum.value:
                if now_values.get(value.number) != value.name:
                    broken.append(f"enum value {value.name} removed or renumbered")
        new_services = {service.name: service for service in new_file.service}
        for service in old_file.service:
            methods = (
                {method.name: method for method in new_services[service.name].method}
                if service.name in new_services
                else {}
            )
            for method in service.method:
                if methods.get(method.name) != method:
                    broken.append(f"rpc {service.name}.{method.name} removed or changed")
    return broken


def current() -> dict[str, FileDescriptorProto]:
    return read_set((ROOT / generate.DESCRIPTOR_SET).read_bytes())


def test_the_schema_still_serves_every_released_agent() -> None:
    assert breaking_changes(read_set(RELEASED.read_bytes()), current()) == []


def change_nothing(file: FileDescriptorProto) -> None:
    pass


def message(file: FileDescriptorProto, name: str) -> DescriptorProto:
    return next(message for message in file.message_type if message.name == name)


def remove_field(file: FileDescriptorProto) -> None:
    del message(file, "Batch").field[0]


def renumber_field(file: FileDescriptorProto) -> None:
    message(file, "Batch").field[0].number = 9


def swap_numbers(file: FileDescriptorProto) -> None:
    fields = message(file, "ImageBatch").field
    fields[3].number, fields[4].number = fields[4].number, fields[3].number


def retype_field(file: FileDescriptorProto) -> None:
    message(file, "ImageBatch").field[1].type = 4  # TYPE_UINT64


def repeat_field(file: FileDescriptorProto) -> None:
    message(file, "Batch").field[0].label = 3  # LABEL_REPEATED


def leave_oneof(file: FileDescriptorProto) -> None:
    message(file, "Answer").field[0].ClearField("oneof_index")


def remove_message(file: FileDescriptorProto) -> None:
    file.message_type.remove(message(file, "StreamDraining"))


def renumber_enum_value(file: FileDescriptorProto) -> None:
    file.enum_type[0].value[1].number = 5


def remove_method(file: FileDescriptorProto) -> None:
    del file.service[0].method[0]


def stop_streaming(file: FileDescriptorProto) -> None:
    file.service[0].method[1].client_streaming = False


def rename_package(file: FileDescriptorProto) -> None:
    file.package = "mekd.v2"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (remove_field, "field Batch.batch_id removed"),
        (renumber_field, "field Batch.batch_id removed or renumbered"),
        (swap_numbers, "renamed"),
        (retype_field, "field ImageBatch.picture_count retyped"),
        (repeat_field, "field Batch.batch_id retyped"),
        (leave_oneof, "field Answer.probabilities moved"),
        (remove_message, "message StreamDraining removed"),
        (renumber_enum_value, "enum value IMAGE_ENCODING_RAW_UINT8"),
        (remove_method, "rpc TeacherInference.Describe removed"),
        (stop_streaming, "rpc TeacherInference.Infer removed or changed"),
        (rename_package, "package mekd.v1 renamed"),
    ],
)
def test_the_checker_finds_each_breaking_change(change: object, found: str) -> None:
    changed = current()
    assert callable(change)
    change(changed["protos/mekd/v1/teacher_inference.proto"])
    assert any(found in broken for broken in breaking_changes(current(), changed))


def test_the_checker_finds_a_removed_file_and_lets_additions_pass() -> None:
    grown = current()
    file = grown["protos/mekd/v1/teacher_inference.proto"]
    file.message_type.add(name="New")
    added = message(file, "Batch").field.add(name="note", number=3)
    added.type = 9  # TYPE_STRING
    assert breaking_changes(current(), grown) == []
    assert breaking_changes(grown, current()) != []
    del grown["protos/mekd/v1/quota_ledger.proto"]
    assert breaking_changes(current(), grown) == ["file protos/mekd/v1/quota_ledger.proto removed"]


# --- buf's rules, where they are cheap ---


@pytest.mark.parametrize("name", sorted(current()))
def test_enums_are_prefixed_and_begin_unspecified(name: str) -> None:
    for enum_name, enum in enums_of(current()[name]):
        prefix = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in enum_name)[1:]
        assert (enum.value[0].number, enum.value[0].name) == (0, f"{prefix}_UNSPECIFIED")
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value)


def test_every_rpc_has_a_request_and_a_response_of_its_own() -> None:
    methods = [method for file in current().values() for service in file.service for method in service.method]
    assert len(methods) == len({method.name for method in methods}) == 21
    for method in methods:
        assert method.input_type == f".mekd.v1.{method.name}Request"
        assert method.output_type == f".mekd.v1.{method.name}Response"


def test_fields_are_snake_case_without_unsigned_integers_and_counts_say_so() -> None:
    unsigned = {4, 6, 7, 13}  # TYPE_UINT64, FIXED64, FIXED32, UINT32
    for file in current().values():
        assert file.package == "mekd.v1" and file.syntax == "proto3"
        for name, described in messages_of(file):
            for field in described.field:
                assert field.name == field.name.lower(), f"{name}.{field.name}"
                assert field.type not in unsigned, f"{name}.{field.name}"


def test_the_descriptor_set_is_that_of_the_loaded_stubs() -> None:
    for module in (quota_ledger_pb2, teacher_inference_pb2):
        loaded = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(loaded)
        kept = current()[loaded.name]
        for side in (loaded, kept):
            side.ClearField("options")
        assert [m.name for m in loaded.message_type] == [m.name for m in kept.message_type]
        assert loaded.service == kept.service
