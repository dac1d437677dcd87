"""Message classes of the two protocols the server speaks, and the names of their methods.

The classes come from `protos/descriptors.binpb` through a private descriptor pool: nothing is registered in protobuf's
process-wide pool, so this module and google-jetstream's own copy of `jetstream_proto` can live in one process, and no
generated code ties the project to a version of protobuf.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

ORCHESTRATOR = "jetstream_proto.Orchestrator"
INFERENCE = "llm_jax.serving.v1.Inference"


def _load_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    path = pathlib.Path(__file__).resolve().parent / "protos" / "descriptors.binpb"
    for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file:
        pool.Add(file)
    # Reflection answers from one pool, and lists the health service and itself beside ours.
    for beside in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(beside.DESCRIPTOR.serialized_pb)
    return pool


POOL = _load_pool()


def _message(name: str) -> Any:  # a class whose attributes no type checker can know
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


DecodeRequest = _message("jetstream_proto.DecodeRequest")
DecodeResponse = _message("jetstream_proto.DecodeResponse")
HealthCheckRequest = _message("jetstream_proto.HealthCheckRequest")
HealthCheckResponse = _message("jetstream_proto.HealthCheckResponse")

GenerateRequest = _message("llm_jax.serving.v1.GenerateRequest")
GenerateResponse = _message("llm_jax.serving.v1.GenerateResponse")
Sampling = _message("llm_jax.serving.v1.Sampling")
TokenIds = _message("llm_jax.serving.v1.TokenIds")
Usage = _message("llm_jax.serving.v1.Usage")
GetModelRequest = _message("llm_jax.serving.v1.GetModelRequest")
Model = _message("llm_jax.serving.v1.Model")
TopLogprobs = _message("llm_jax.serving.v1.TopLogprobs")
PromptLogprob = _message("llm_jax.serving.v1.PromptLogprob")
EmbedRequest = _message("llm_jax.serving.v1.EmbedRequest")
EmbedResponse = _message("llm_jax.serving.v1.EmbedResponse")
Prompt = _message("llm_jax.serving.v1.Prompt")
SessionRequest = _message("llm_jax.serving.v1.SessionRequest")
SessionResponse = _message("llm_jax.serving.v1.SessionResponse")
Failure = _message("llm_jax.serving.v1.Failure")
Done = _message("llm_jax.serving.v1.Done")
Cancel = _message("llm_jax.serving.v1.Cancel")
Embedding = _message("llm_jax.serving.v1.Embedding")


def parser(message: Any) -> Callable[[bytes], Any]:
    """A deserializer that gives None for bytes that are no such message, so that the method can say so."""

    def parse(data: bytes):
        try:
            return message.FromString(data)
        except DecodeError:
            return None

    return parse


# The engine's names of what `Pooling` counts; a number that is not in it is from a newer client.
POOLINGS = {0: "mean", 1: "mean", 2: "last"}
_FINISH_REASONS = POOL.FindEnumTypeByName("llm_jax.serving.v1.FinishReason")


def finish_reason_number(reason: str | None) -> int:
    """The enum value for a `finish_reason`, such as "stop" or "content_filter"; None (the sample goes on) is 0."""
    return 0 if reason is None else _FINISH_REASONS.values_by_name[f"FINISH_REASON_{reason.upper()}"].number


def finish_reason_name(number: int) -> str | None:
    """The inverse of `finish_reason_number`; a number from a newer server is given as its digits."""
    if number == 0:
        return None
    value = _FINISH_REASONS.values_by_number.get(number)
    return value.name.removeprefix("FINISH_REASON_").lower() if value else str(number)
