"""A client for the server, as a class and (`client_command`) as a command; imports neither JAX nor NumPy.

    python -m serving.client --address=127.0.0.1:9000 --prompt="def main(" --max_tokens=64 --temperature=0.8

    with Client("127.0.0.1:9000") as client:
        for chunk in client.generate("def main(", max_tokens=64):
            print(chunk.text, end="", flush=True)
        vectors = client.embed(["def main(", "从前"])
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc

from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint, PromptLogprob, TopLogprobs
from serving import messages

CONNECT_TIMEOUT_S = 5.0
_POOLINGS = {"mean": 1, "last": 2}


class RequestFailed(UserError):
    """The server ended a call with an error.

    Attributes:
      code: the gRPC status, e.g. `grpc.StatusCode.RESOURCE_EXHAUSTED`.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of one sample, as it arrives.

    Attributes:
      sample: which sample, from 0.
      text: whole characters.
      token_ids: tokens since the last chunk; their text may come later.
      logprobs: of each of token_ids, if asked for.
      top_logprobs: for each of them, if asked for, the likeliest tokens as (id, log-probability), the best first.
      prompt_logprobs: in the first chunks of sample 0, if asked for: the prompt's tokens from the second on.
      finish_reason: in the last chunk "stop", "length" or "deadline"; the JetStream protocol has none, so None there.
      prompt_tokens, completion_tokens, cached_tokens: in the last chunk; None in the JetStream protocol.
    """

    sample: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


class Client:
    """A connection to one server. Thread-safe, like the gRPC channel under it.

    Args:
      address: `host:port`, or `[host]:port` for IPv6.
      connect_timeout_s: how long to try to reach the server.
      timeout_s: limit on each call, seconds; None waits for as long as the server streams.

    Raises:
      UserError: there is no server at the address.
    """

    def __init__(self, address: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S,
                 timeout_s: float | None = None) -> None:
        self._address = address
        self._timeout_s = timeout_s
        # A proxy meant for the internet (http_proxy) does not know this machine's own ports.
        local = address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
        self._channel = grpc.insecure_channel(address, options=[
            ("grpc.max_receive_message_length", -1), *([("grpc.enable_http_proxy", 0)] if local else [])])
        try:
            grpc.channel_ready_future(self._channel).result(timeout=connect_timeout_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise UserError(f"no server at {address} (tried for {connect_timeout_s:g} s)") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it the calls that still run."""
        self._channel.close()

    def health(self) -> bool:
        """Whether the server takes new work; False also when it has gone away."""
        try:
            return self._call(messages.ORCHESTRATOR, "HealthCheck", messages.HealthCheckRequest(),
                              messages.HealthCheckResponse).is_live
        except RequestFailed as error:
            if error.code == grpc.StatusCode.UNAVAILABLE:
                return False
            raise

    def model(self):
        """The served model's `llm_jax.serving.v1.Model`: its limits and special tokens."""
        return self._call(messages.INFERENCE, "GetModel", messages.GetModelRequest(), messages.Model)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        min_tokens: int | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        num_samples: int = 1,
        best_of: int = 0,
        priority: int = 0,
        tenant: str = "",
        deadline_seconds: float | None = None,
    ) -> Iterator[Chunk]:
        """Streams the continuation of `prompt`; closing the iterator cancels the request on the server.

        Args:
          prompt: text, or token ids that are used as they are.
          max_tokens: new tokens of each sample, at most; 0 is as many as fit.
          temperature, top_k, top_p, min_p, repetition_penalty, min_tokens: as in
            `llm_jax.inference.request.SamplingParams`; as the served model came configured where they are None.
          seed, presence_penalty, frequency_penalty, logit_bias, stop_ids, ignore_eos, constraint: as there.
          stop: strings before the first of which the text ends; one may be given as it is.
          logprobs: whether chunks carry log-probabilities.
          top_logprobs: those of how many of the likeliest tokens beside each.
          prompt_logprobs: the same for the prompt's tokens; None is not even their own.
          num_samples: samples of the one prompt.
          best_of: draw so many, and send the likeliest when all have finished; 0 is num_samples.
          priority: larger goes first among the requests that wait.
          tenant: whose request it is; computed prompts are used again within a tenant alone.
          deadline_seconds: end with what there is after so long.

        Yields:
          `Chunk`s, those of different samples in the order they arrive.

        Raises:
          UserError: an argument does not fit its field.
          RequestFailed: the server refused the request or could not finish it.
        """
        with _checked():
            sampling = messages.Sampling(
                max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, min_p=min_p,
                repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty, logit_bias=logit_bias,
                stop=[stop] if isinstance(stop, str) else stop, stop_ids=stop_ids, min_tokens=min_tokens,
                ignore_eos=ignore_eos, logprobs=logprobs, top_logprobs=top_logprobs, prompt_logprobs=prompt_logprobs,
                num_samples=num_samples, best_of=best_of)
            if constraint is not None:
                setattr(sampling, constraint.kind, constraint.text)
            request = messages.GenerateRequest(sampling=sampling, priority=priority, tenant=tenant,
                                               deadline_seconds=deadline_seconds)
            _set_prompt(request, prompt)
        for response in self._stream(messages.INFERENCE, "Generate", request, messages.GenerateResponse):
            ended = response.HasField("usage")
            yield Chunk(
                sample=response.sample, text=response.text, token_ids=tuple(response.token_ids),
                logprobs=tuple(response.logprobs),
                finish_reason=messages.finish_reason_name(response.finish_reason),
                prompt_tokens=response.usage.prompt_tokens if ended else None,
                completion_tokens=response.usage.completion_tokens if ended else None,
                cached_tokens=response.usage.cached_tokens if ended else None,
                top_logprobs=tuple(map(_pairs, response.top_logprobs)),
                prompt_logprobs=tuple(PromptLogprob(p.token_id, p.logprob, _pairs(p.top))
                                      for p in response.prompt_logprobs))

    def embed(self, prompts: Sequence[str | Sequence[int]], pooling: str = "mean", *,
              priority: int = 0) -> list[tuple[float, ...]]:
        """A vector for each text: the model's hidden states, pooled.

        Args:
          prompts: texts, or token ids that are used as they are; 64 at once, at most.
          pooling: "mean" or "last".
          priority: as of `generate`.
        """
        if pooling not in _POOLINGS:
            raise UserError(f"pooling must be one of {', '.join(_POOLINGS)}, not {pooling!r}")
        with _checked():
            request = messages.EmbedRequest(pooling=_POOLINGS[pooling], priority=priority)
            for prompt in prompts:
                _set_prompt(request.inputs.add(), prompt)
        answer = self._call(messages.INFERENCE, "Embed", request, messages.EmbedResponse, wait=True)
        return [tuple(one.values) for one in answer.embeddings]

    def decode(self, prompt: str | Sequence[int], *, max_tokens: int = 0, num_samples: int = 1, has_bos: bool = False,
               priority: int = 0) -> Iterator[Chunk]:
        """The same over the JetStream protocol, which leaves sampling to the server and says nothing at the end."""
        with _checked():
            request = messages.DecodeRequest(max_tokens=max_tokens, num_samples=num_samples, has_bos=has_bos,
                                             priority=priority)
            if isinstance(prompt, str):
                request.text_content.text = prompt
            else:
                request.token_content.token_ids.extend(prompt)
                request.token_content.SetInParent()
        for response in self._stream(messages.ORCHESTRATOR, "Decode", request, messages.DecodeResponse):
            for index, sample in enumerate(response.stream_content.samples):
                if sample.text or sample.token_ids:
                    yield Chunk(sample=index, text=sample.text, token_ids=tuple(sample.token_ids))

    def _call(self, service: str, method: str, request, answer: Any, wait: bool = False):
        call = self._channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        try:
            return call(request, timeout=self._timeout_s or (None if wait else CONNECT_TIMEOUT_S))
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def _stream(self, service: str, method: str, request, answer: Any) -> Iterator:
        start = self._channel.unary_stream(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        call = start(request, timeout=self._timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._failure(error) from None
        finally:
            call.cancel()

    def _failure(self, error: grpc.RpcError) -> RequestFailed:
        code = error.code()
        return RequestFailed(code, f"{self._address} answered {code.name}: {error.details()}")


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """UserError for a value that its field of the message can't hold."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"the request can't be sent: {error}") from None


def _set_prompt(holder: Any, prompt: str | Sequence[int]) -> None:
    if isinstance(prompt, str):
        holder.text = prompt
    else:
        holder.token_ids.ids.extend(prompt)
        holder.token_ids.SetInParent()


def _pairs(top: Any) -> TopLogprobs:
    return tuple(zip(top.token_ids, top.logprobs, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 after an error that was told in one line, 130 after Ctrl-C."""
    from serving import client_command

    return client_command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
