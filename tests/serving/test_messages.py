"""The protocols: what the descriptor set says, against the .proto text and a stranger's description."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
from google.protobuf.descriptor import FieldDescriptor

import serving
from serving import messages
from tests.serving.doubles import jetstream_description

PROTOS = pathlib.Path(serving.__file__).parent / "protos"
FIELD = re.compile(r"^\s*(?:optional\s+|repeated\s+)?(?:[\w.]+|map<\w+, \w+>)\s+(\w+)\s*=\s*(\d+);", re.MULTILINE)


def _fields(message, prefix=""):
    for field in message.fields:
        yield f"{prefix}{message.name}.{field.name}", field.number, field.type, field.is_repeated
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:  # not written down
            yield from _fields(nested, f"{prefix}{message.name}.")


@pytest.mark.parametrize("name", ["jetstream.proto", "llm_jax_serving_v1.proto"])
def test_descriptor_set_is_what_the_proto_text_says(name):
    text = re.sub(r"//.*", "", (PROTOS / name).read_text())
    described = messages.POOL.FindFileByName(name)
    compiled = [(field.rpartition(".")[2], number) for message in described.message_types_by_name.values()
                for field, number, _, _ in _fields(message)]
    compiled += [(value.name, value.number) for enum in described.enum_types_by_name.values() for value in enum.values]
    written = [(field, int(number)) for field, number in FIELD.findall(text)]
    written += [(field, int(number)) for field, number in re.findall(r"^\s+([A-Z_]+)\s*=\s*(\d+);", text, re.MULTILINE)]
    assert sorted(compiled) == sorted(written)
    methods = [method for service in described.services_by_name.values() for method in service.methods]
    assert re.findall(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\)", text) == [
        (m.name, "stream " if m.client_streaming else "", m.input_type.name,
         "stream " if m.server_streaming else "", m.output_type.name) for m in methods]


def test_jetstream_fields_are_upstreams():
    ours = {name: rest for message in messages.POOL.FindFileByName("jetstream.proto").message_types_by_name.values()
            for name, *rest in _fields(message)}
    pool = messages.descriptor_pool.DescriptorPool()
    pool.Add(jetstream_description())
    theirs = {name: rest for message in pool.FindFileByName("foreign.proto").message_types_by_name.values()
              for name, *rest in _fields(message)}
    extra = {"DecodeRequest.metadata": [7, FieldDescriptor.TYPE_MESSAGE, False],
             "DecodeRequest.Metadata.start_time": [1, FieldDescriptor.TYPE_FLOAT, False]}
    assert ours == theirs | extra


def test_numbers_of_before_are_what_they_were():
    """A client of the first version of the project's own service finds every field where it knows it."""
    known = {"GenerateRequest": ["text", "token_ids", "sampling", "priority"], "TokenIds": ["ids"], "Sampling": [
        "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos", "logprobs", "num_samples"],
        "GenerateResponse": ["sample", "text", "token_ids", "logprobs", "finish_reason", "usage"],
        "Usage": ["prompt_tokens", "completion_tokens", "seconds_to_first_token"],
        "Model": ["max_context", "max_prompt_tokens", "vocab_size", "bos_id", "end_ids"]}
    for name, fields in known.items():
        described = messages.POOL.FindMessageTypeByName(f"llm_jax.serving.v1.{name}").fields_by_number
        assert [described[number].name for number in range(1, len(fields) + 1)] == fields


def test_nothing_is_registered_where_google_jetstream_registers():
    """In the default pool, an altered file of the same package and name can still be added after our import."""
    program = """
from google.protobuf import descriptor_pb2, descriptor_pool
from serving import messages
for name in ("jetstream/core/proto/jetstream.proto", "jetstream.proto"):
    file = descriptor_pb2.FileDescriptorProto(name=name, package="jetstream_proto", syntax="proto3")
    file.message_type.add(name="DecodeRequest" if "/" in name else "Another").field.add(
        name="altered", number=77, type=5, label=1)
    descriptor_pool.Default().Add(file)
assert descriptor_pool.Default().FindMessageTypeByName("jetstream_proto.DecodeRequest").fields[0].number == 77
assert messages.DecodeRequest(max_tokens=3).max_tokens == 3
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PROTOS.parent.parent)


def test_finish_reasons_have_names():
    for reason in (None, "stop", "length", "deadline"):
        assert messages.finish_reason_name(messages.finish_reason_number(reason)) == reason
    assert messages.finish_reason_name(99) == "99"
