"""`jetstream_proto.Orchestrator`: what JetStream's clients expect, over this project's engine.

As upstream does it: text prompts are answered with text and token ids, token prompts with token ids alone; every
message holds one entry a sample, because clients read the first (or all) without looking at how many there are.
"""

from __future__ import annotations

import dataclasses

import grpc

from llm_jax.inference.request import Delta
from serving import messages
from serving.admission import Admission
from serving.calls import Calls
from serving.errors import invalid
from serving.rpc import method, open_method, parser

_StreamContent = messages.DecodeResponse.StreamContent
_Sample = _StreamContent.Sample


@dataclasses.dataclass(frozen=True)
class DecodeSampling:
    """How `Decode` samples: its request has no fields for it.

    What is None is as the model came configured; the likeliest token each time, if it came with nothing.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class Orchestrator:
    """The two methods of the service."""

    full_name = messages.ORCHESTRATOR

    def __init__(self, calls: Calls, sampling: DecodeSampling) -> None:
        self._calls = calls
        self._sampling = sampling

    @method("generate")
    async def Decode(self, request, context, admission: Admission) -> None:
        """Streams the continuation of the prompt."""
        if request.lora_adapter_id:
            raise invalid(f"lora_adapter_id={request.lora_adapter_id!r}: this server has no adapters loaded; "
                          "leave the field empty", "lora_adapter_id")
        content = request.WhichOneof("content")
        if content is None:
            raise invalid("the request has no content: set text_content or token_content")
        if content == "text_content":
            prompt_ids = await self._calls.encode(request.text_content.text, add_bos=not request.has_bos)
        else:
            prompt_ids = self._calls.token_ids(request.token_content.token_ids)
            tokenizer = self._calls.front.tokenizer
            # Upstream puts the token in front unless told not to, and would double one that is there already.
            if not request.has_bos and tokenizer.adds_bos and prompt_ids[:1] != [tokenizer.bos_id]:
                prompt_ids.insert(0, tokenizer.bos_id)
        sampling = self._calls.sampling(prompt_ids, max_tokens=request.max_tokens, num_samples=request.num_samples,
                                        **dataclasses.asdict(self._sampling))
        num_samples = request.num_samples or 1
        with_text = content == "text_content"
        began = False

        async def write(news: dict[int, Delta], _first_token: dict[int, float]) -> None:
            nonlocal began
            if not began and not with_text:
                # Clients that take the time to the first token ask for exactly one token in the first message.
                first = {sample: delta.token_ids[:1] for sample, delta in news.items()}
                await context.write(_response([_Sample(token_ids=first.get(i, ())) for i in range(num_samples)]))
                news = {sample: dataclasses.replace(delta, token_ids=delta.token_ids[1:])
                        for sample, delta in news.items()}
                began = True
                if not any(delta.token_ids for delta in news.values()):
                    return
            samples = [_Sample()] * num_samples
            for sample, delta in news.items():
                samples[sample] = _Sample(text=delta.text if with_text else "", token_ids=delta.token_ids)
            await context.write(_response(samples))

        await self._calls.stream(prompt_ids, sampling, num_samples, request.priority, write,
                                 admission=admission)

    @open_method
    async def HealthCheck(self, request, context):
        """Whether the server takes new work; anybody may ask."""
        return messages.HealthCheckResponse(is_live=self._calls.is_live)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as gRPC registers it."""
        return grpc.method_handlers_generic_handler(messages.ORCHESTRATOR, {
            "Decode": grpc.unary_stream_rpc_method_handler(
                self.Decode, parser(self._calls, messages.DecodeRequest), messages.DecodeResponse.SerializeToString),
            "HealthCheck": grpc.unary_unary_rpc_method_handler(
                self.HealthCheck, parser(self._calls, messages.HealthCheckRequest),
                messages.HealthCheckResponse.SerializeToString),
        })


def _response(samples: list):
    return messages.DecodeResponse(stream_content=_StreamContent(samples=samples))
