"""`llm_jax.serving.v1.Inference`: the project's own service, with everything that the engine can do per request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc

from llm_jax.inference.request import MAX_LOGPROBS, Constraint, Delta, SamplingParams, TopLogprobs
from serving import messages, session
from serving.admission import Admission
from serving.calls import Calls
from serving.errors import invalid
from serving.rpc import method, parser

# Fields that mean something when they are absent, and those that are always said.
_OPTIONAL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "min_tokens", "prompt_logprobs")
_PLAIN = ("presence_penalty", "frequency_penalty", "ignore_eos")
PIECE = 1024  # tokens of which one message tells the likeliest, at most: clients take 4 MiB unless told otherwise


class Inference:
    """The methods of the service."""

    full_name = messages.INFERENCE

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @method("generate")
    async def Generate(self, request, context, admission: Admission) -> None:
        """Streams the continuation of the prompt."""
        await self._generate(request, admission, context.write)

    @method("generate", counted=False)
    async def Session(self, requests, context, admission: Admission) -> None:
        """Generates for several requests at once, which come and are cancelled while others run."""
        await session.Session(self._calls, admission.caller, self._generate, context.write).run(requests)

    async def _generate(self, request: Any, admission: Admission, send: Callable[[Any], Awaitable[None]]) -> None:
        prompt_ids = await self._prompt_ids(request)
        asked = request.sampling
        sampling = self._sampling(prompt_ids, asked)
        deadline_s = request.deadline_seconds if request.HasField("deadline_seconds") else None
        if deadline_s is not None and not deadline_s > 0:
            raise invalid(f"deadline_seconds={deadline_s:g} must be more than 0", "deadline_seconds")
        with_logprobs = asked.logprobs or asked.top_logprobs > 0

        async def write(news: dict[int, Delta], first_token: dict[int, float]) -> None:
            for sample, delta in news.items():
                for response in _responses(sample, delta, with_logprobs, first_token.get(sample, 0.0)):
                    await send(response)

        await self._calls.stream(prompt_ids, sampling, asked.num_samples, request.priority, write,
                                 admission=admission, best_of=asked.best_of, deadline_s=deadline_s)

    @method("embed")
    async def Embed(self, request, context, admission: Admission):
        """A vector for each text."""
        calls = self._calls
        if not 1 <= len(request.inputs) <= calls.max_samples:
            raise invalid(f"there are {len(request.inputs)} inputs; 1 to {calls.max_samples} may be sent at once",
                          "inputs")
        pooling = messages.POOLINGS.get(request.pooling)
        if pooling is None:
            raise invalid(f"pooling={request.pooling} is unknown: POOLING_MEAN (1) or POOLING_LAST (2)",
                          "pooling")
        prompts = [await self._prompt_ids(one) for one in request.inputs]
        if not all(prompts):
            raise invalid("an input has no tokens", "inputs")
        found = await calls.embed(prompts, pooling, request.priority, admission=admission)
        return messages.EmbedResponse(embeddings=[
            messages.Embedding(values=delta.embedding.tolist(), prompt_tokens=len(prompt_ids))
            for prompt_ids, delta in zip(prompts, found, strict=True)])

    @method("read")
    async def GetModel(self, request, context, admission: Admission):
        """The limits and special tokens of the served model."""
        front = self._calls.front
        return messages.Model(
            max_context=front.max_context, max_prompt_tokens=front.max_prompt_tokens,
            vocab_size=front.tokenizer.vocab_size, end_ids=front.tokenizer.end_ids,
            bos_id=front.tokenizer.bos_id if front.tokenizer.adds_bos else None)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as gRPC registers it."""
        calls = self._calls
        return grpc.method_handlers_generic_handler(messages.INFERENCE, {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.Generate, parser(calls, messages.GenerateRequest), messages.GenerateResponse.SerializeToString),
            "Session": grpc.stream_stream_rpc_method_handler(
                self.Session, parser(calls, messages.SessionRequest), messages.SessionResponse.SerializeToString),
            "Embed": grpc.unary_unary_rpc_method_handler(
                self.Embed, parser(calls, messages.EmbedRequest), messages.EmbedResponse.SerializeToString),
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self.GetModel, parser(calls, messages.GetModelRequest), messages.Model.SerializeToString),
        })

    async def _prompt_ids(self, holder: Any) -> list[int]:
        """Tokens of a message's `prompt`."""
        kind = holder.WhichOneof("prompt")
        if kind is None:
            raise invalid("the request has no prompt: set text or token_ids", "prompt")
        return await self._calls.encode(holder.text) if kind == "text" else self._calls.token_ids(holder.token_ids.ids)

    def _sampling(self, prompt_ids: list[int], asked: Any) -> SamplingParams:
        said = {name: getattr(asked, name) for name in _OPTIONAL if asked.HasField(name)}
        said |= {name: getattr(asked, name) for name in _PLAIN}
        if not 0 <= asked.top_logprobs <= MAX_LOGPROBS:
            raise invalid(f"top_logprobs={asked.top_logprobs} must lie between 0 and {MAX_LOGPROBS}", "top_logprobs")
        kind = asked.WhichOneof("constraint")
        return self._calls.sampling(
            prompt_ids, max_tokens=asked.max_tokens, num_samples=asked.num_samples, best_of=asked.best_of,
            stop=tuple(asked.stop) or None, stop_ids=tuple(asked.stop_ids), logit_bias=tuple(asked.logit_bias.items()),
            logprobs=asked.top_logprobs, constraint=None if kind is None else Constraint(kind, getattr(asked, kind)),
            **said)


def _responses(sample: int, delta: Delta, with_logprobs: bool, first_token_s: float) -> Iterator[Any]:
    """The delta as messages: one, unless it is long for what it tells of each token."""
    for start in range(0, len(delta.prompt_logprobs), PIECE):
        yield messages.GenerateResponse(sample=sample, prompt_logprobs=[
            messages.PromptLogprob(token_id=one.token_id, logprob=one.logprob, top=_top(one.top) if one.top else None)
            for one in delta.prompt_logprobs[start:start + PIECE]])
    starts = list(range(0, len(delta.token_ids), PIECE if delta.top_logprobs else max(1, len(delta.token_ids)))) or [0]
    for start in starts:
        is_last = start == starts[-1]
        part = slice(start, None if is_last else start + PIECE)
        response = messages.GenerateResponse(
            sample=sample, text=delta.text if is_last else "", token_ids=delta.token_ids[part],
            logprobs=delta.logprobs[part] if with_logprobs else (), top_logprobs=map(_top, delta.top_logprobs[part]),
            finish_reason=messages.finish_reason_number(delta.finish_reason if is_last else None))
        if delta.usage is not None and is_last:
            response.usage.prompt_tokens = delta.usage.prompt_tokens
            response.usage.completion_tokens = delta.usage.completion_tokens
            response.usage.cached_tokens = delta.usage.cached_tokens
            response.usage.seconds_to_first_token = first_token_s
        yield response


def _top(best: TopLogprobs) -> Any:
    return messages.TopLogprobs(token_ids=[i for i, _ in best], logprobs=[value for _, value in best])
