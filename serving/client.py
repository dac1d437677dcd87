"""A client for the server, as a class and as a command; imports neither JAX nor the library's heavy parts.

    python -m serving.client --address=127.0.0.1:9000 --prompt="def main(" --max_tokens=64 --temperature=0.8

    with Client("127.0.0.1:9000") as client:
        for chunk in client.generate("def main(", max_tokens=64):
            print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from llm_jax.errors import UserError
from serving import messages

CONNECT_TIMEOUT_S = 5.0


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
      finish_reason: in the last chunk "stop" or "length"; the JetStream protocol has none, so None there.
      prompt_tokens, completion_tokens: in the last chunk; None in the JetStream protocol.
    """

    sample: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


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
        self._channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)] if local else None)
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
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: bool = False,
        num_samples: int = 1,
        priority: int = 0,
    ) -> Iterator[Chunk]:
        """Streams the continuation of `prompt`; closing the iterator cancels the request on the server.

        Args:
          prompt: text, or token ids that are used as they are.
          max_tokens: new tokens of each sample, at most; 0 is as many as fit.
          temperature, top_k, top_p, seed, ignore_eos: as in `llm_jax.inference.request.SamplingParams`; the first three
            are as the served model came configured where they are None.
          stop: strings before the first of which the text ends; one may be given as it is.
          logprobs: whether chunks carry log-probabilities.
          num_samples: samples of the one prompt.
          priority: larger goes first among the requests that wait.

        Yields:
          `Chunk`s, those of different samples in the order they arrive.

        Raises:
          UserError: an argument does not fit its field.
          RequestFailed: the server refused the request or could not finish it.
        """
        with _checked():
            request = messages.GenerateRequest(
                sampling=messages.Sampling(
                    max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                    stop=[stop] if isinstance(stop, str) else stop,
                    ignore_eos=ignore_eos, logprobs=logprobs, num_samples=num_samples),
                priority=priority)
            if isinstance(prompt, str):
                request.text = prompt
            else:
                request.token_ids.ids.extend(prompt)
                request.token_ids.SetInParent()
        for response in self._stream(messages.INFERENCE, "Generate", request, messages.GenerateResponse):
            ended = response.HasField("usage")
            yield Chunk(
                sample=response.sample, text=response.text, token_ids=tuple(response.token_ids),
                logprobs=tuple(response.logprobs),
                finish_reason=messages.finish_reason_name(response.finish_reason),
                prompt_tokens=response.usage.prompt_tokens if ended else None,
                completion_tokens=response.usage.completion_tokens if ended else None)

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

    def _call(self, service: str, method: str, request, answer: Any):
        call = self._channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        try:
            return call(request, timeout=self._timeout_s or CONNECT_TIMEOUT_S)
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.client", allow_abbrev=False,
                                     description="Stream a completion from a server to the terminal.")
    parser.add_argument("--address", default="127.0.0.1:9000", help="host:port of the server")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from standard input")
    parser.add_argument("--max_tokens", type=int, default=128, help="new tokens, at most; 0 is as many as fit")
    parser.add_argument("--temperature", type=float, default=None,
                        help="0 takes the likeliest token each time; by default as the model came configured, else 0")
    parser.add_argument("--top_k", type=int, default=None, help="draw among this many likeliest tokens; 0 is off")
    parser.add_argument("--top_p", type=float, default=None, help="draw among the likeliest that hold this probability")
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same tokens")
    parser.add_argument("--stop", action="append", default=[], help="end before this text (repeatable)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")
    parser.add_argument("--jetstream", action="store_true",
                        help="speak JetStream's protocol (greedy unless the server was told otherwise)")
    parser.add_argument("--timeout", type=float, default=None, help="give up after this many seconds")
    return parser.parse_args(argv)


def _argument_text(argument: str) -> str:
    """What was typed: without a Unicode locale Python holds an argument's bytes as lone surrogates."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"an argument is not UTF-8 (byte {error.start} of {argument!r})") from None


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return _argument_text(prompt)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start})") from None


def _chunks(client: Client, args: argparse.Namespace, prompt: str) -> Iterator[Chunk]:
    if args.jetstream:
        given = [name for name in ("temperature", "top_k", "top_p", "seed", "stop")
                 if getattr(args, name) not in (None, [])]
        if given:
            raise UserError(f"JetStream's protocol has no field for --{given[0]}; leave out --jetstream")
        return client.decode(prompt, max_tokens=args.max_tokens)
    return client.generate(prompt, max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                           top_p=args.top_p, seed=args.seed, stop=[_argument_text(stop) for stop in args.stop],
                           logprobs=args.json)


def _run(args: argparse.Namespace) -> None:
    prompt = _read_prompt(args.prompt)
    with Client(args.address, connect_timeout_s=CONNECT_TIMEOUT_S, timeout_s=args.timeout) as client:
        started = time.perf_counter()
        first_token_at = None
        last = None
        text: list[str] = []
        token_ids: list[int] = []
        logprobs: list[float] = []
        for chunk in _chunks(client, args, prompt):
            if chunk.token_ids and first_token_at is None:
                first_token_at = time.perf_counter()
            text.append(chunk.text)
            token_ids.extend(chunk.token_ids)
            logprobs.extend(chunk.logprobs)
            last = chunk
            if not args.json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        seconds = time.perf_counter() - started
    first_token_s = first_token_at - started if first_token_at else seconds
    tokens, rate = len(token_ids), len(token_ids) / seconds
    finish_reason = last.finish_reason if last else None
    if args.json:
        print(json.dumps({
            "text": "".join(text), "token_ids": token_ids, "logprobs": logprobs, "finish_reason": finish_reason,
            "prompt_tokens": last.prompt_tokens if last else None, "completion_tokens": tokens,
            "time_to_first_token_s": round(first_token_s, 6), "tokens_per_second": round(rate, 3),
        }, ensure_ascii=False))
        return
    print(flush=True)
    print(f"[{finish_reason or 'end of stream'}; {tokens} tokens; first after {first_token_s * 1000:.0f} ms; "
          f"{rate:.1f} tokens/s]", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 after an error that was told in one line, 130 after Ctrl-C."""
    args = _parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says, or Chinese could not be printed
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # e.g. `| head`: nobody reads on, so there is nothing left to flush at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
