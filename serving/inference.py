"""`llm_jax.serving.v1.Inference`: the project's own service, with sampling, stop strings and counts per request."""

from __future__ import annotations

import grpc

from llm_jax.inference.request import Delta
from serving import messages
from serving.calls import Calls, invalid, method


class Inference:
    """The two methods of the service."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @method
    async def Generate(self, request, context) -> None:
        """Streams the continuation of the prompt."""
        prompt = request.WhichOneof("prompt")
        if prompt is None:
            raise invalid("the request has no prompt: set text or token_ids")
        if prompt == "text":
            prompt_ids = await self._calls.encode(request.text)
        else:
            prompt_ids = self._calls.token_ids(request.token_ids.ids)
        asked = request.sampling
        said = {name: getattr(asked, name) for name in ("temperature", "top_k", "top_p", "seed")
                if asked.HasField(name)}
        sampling = self._calls.sampling(prompt_ids, max_tokens=asked.max_tokens, num_samples=asked.num_samples,
                                        stop=tuple(asked.stop) or None, ignore_eos=asked.ignore_eos, **said)

        async def write(news: dict[int, Delta], first_token: dict[int, float]) -> None:
            for sample, delta in news.items():
                await context.write(_response(sample, delta, asked.logprobs, first_token.get(sample, 0.0)))

        await self._calls.stream(prompt_ids, sampling, asked.num_samples, request.priority, write)

    @method
    async def GetModel(self, request, context):
        """The limits and special tokens of the served model."""
        service = self._calls.service
        return messages.Model(
            max_context=service.max_context, max_prompt_tokens=service.max_prompt_tokens,
            vocab_size=service.tokenizer.vocab_size, end_ids=service.tokenizer.end_ids,
            bos_id=service.tokenizer.bos_id if service.tokenizer.adds_bos else None)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as gRPC registers it."""
        return grpc.method_handlers_generic_handler(messages.INFERENCE, {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.Generate, self._calls.parser(messages.GenerateRequest),
                messages.GenerateResponse.SerializeToString),
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self.GetModel, self._calls.parser(messages.GetModelRequest), messages.Model.SerializeToString),
        })


def _response(sample: int, delta: Delta, with_logprobs: bool, first_token_s: float):
    response = messages.GenerateResponse(
        sample=sample, text=delta.text, token_ids=delta.token_ids, logprobs=delta.logprobs if with_logprobs else (),
        finish_reason=messages.finish_reason_number(delta.finish_reason))
    if delta.usage is not None:
        response.usage.prompt_tokens = delta.usage.prompt_tokens
        response.usage.completion_tokens = delta.usage.completion_tokens
        response.usage.seconds_to_first_token = first_token_s
    return response
