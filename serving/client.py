"""A client for the server, as a class and (`client_command`) as a command; imports neither JAX nor NumPy.

    python -m serving.client --address=127.0.0.1:9000 --prompt="def main(" --max_tokens=64 --temperature=0.8

    with Client("127.0.0.1:9000") as client:
        for chunk in client.generate("def main(", max_tokens=64):
            print(chunk.text, end="", flush=True)
        vectors = client.embed(["def main(", "从前"])
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import grpc

from llm_jax.errors import UserError
from serving import messages
from serving.client_request import (
    Asked,
    Chunk,
    WrongType,
    check_type,
    checked,
    chunk,
    generate_request,
    set_prompt,
)
from serving.client_session import Session

__all__ = ["Asked", "Chunk", "Client", "RequestFailed", "WrongType"]
CONNECT_TIMEOUT_S = 5.0
_POOLINGS = {"mean": 1, "last": 2}


class RequestFailed(UserError):
    """The server ended a call with an error.

    Attributes:
      code: the gRPC status, e.g. `grpc.StatusCode.RESOURCE_EXHAUSTED`.
      request_id: by which the server's logs know the request; "" if it never got there.
    """

    def __init__(self, code: grpc.StatusCode, message: str, request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class Client:
    """A connection to one server. Thread-safe, like the gRPC channel under it.

    Args:
      address: `host:port`, or `[host]:port` for IPv6.
      api_key: where the server asks for one. Never told to anybody else, but readable on the way without TLS.
      tls: whether the server speaks TLS; `tls_ca` and `tls_cert` say so by themselves.
      tls_ca: PEM file of the authorities that may sign the server's certificate; None takes the system's.
      tls_cert, tls_key: PEM files of a certificate to show, and its private key, where the server asks for one.
      connect_timeout_s: how long to try to reach the server.
      timeout_s: limit on each call, seconds; None waits for as long as the server streams.

    Raises:
      UserError: there is no server at the address, a file can't be read, or the key is none.
      WrongType: an argument is of another type.
    """

    def __init__(self, address: str, *, api_key: str | None = None, tls: bool = False, tls_ca: str | None = None,
                 tls_cert: str | None = None, tls_key: str | None = None,
                 connect_timeout_s: float = CONNECT_TIMEOUT_S, timeout_s: float | None = None) -> None:
        for name, value in {"address": address, "api_key": api_key, "tls_ca": tls_ca, "tls_cert": tls_cert,
                            "tls_key": tls_key}.items():
            if name == "address" or value is not None:
                check_type(name, value, str)
        check_type("connect_timeout_s", connect_timeout_s, float)
        if timeout_s is not None:
            check_type("timeout_s", timeout_s, float)
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = _metadata(api_key)
        # A proxy meant for the internet (http_proxy) does not know this machine's own ports.
        local = address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
        options = [("grpc.max_receive_message_length", -1), *([("grpc.enable_http_proxy", 0)] if local else [])]
        tls = bool(tls or tls_ca or tls_cert)
        if tls:
            credentials = grpc.ssl_channel_credentials(*map(_contents, (tls_ca, tls_key, tls_cert)))
            self._channel = grpc.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=connect_timeout_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            how = f"with TLS and a certificate of {tls_ca or 'an authority that this system trusts'}" if tls else (
                "without TLS")
            raise UserError(f"no server at {address} speaks gRPC {how} (tried for {connect_timeout_s:g} s)") from None

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

    def generate(self, prompt: str | Sequence[int], **asked: Unpack[Asked]) -> Iterator[Chunk]:
        """Streams the continuation of `prompt`; closing the iterator cancels the request on the server.

        Args:
          prompt: text, or token ids that are used as they are.
          **asked: see `serving.client_request.Asked`.

        Returns:
          `Chunk`s, those of different samples in the order they arrive.

        Raises:
          UserError: an argument does not fit its field (a `WrongType` if it is of another type); at once.
          RequestFailed: the server refused the request or could not finish it; while it is read.
        """
        return self._generated(generate_request(prompt, asked))

    def session(self) -> Session:
        """A call in which several requests run at once; to be closed, or used as a context.

            with client.session() as session:
                one, other = session.start("从前", max_tokens=64), session.start("def main(", max_tokens=64)
                for chunk in one: …
                other.cancel()
        """
        start = self._channel.stream_stream(f"/{messages.INFERENCE}/Session", messages.SessionRequest.SerializeToString,
                                            messages.SessionResponse.FromString)
        return Session(lambda requests: start(requests, timeout=self._timeout_s, metadata=self._metadata),
                       self._failure, lambda code, said: RequestFailed(code, self._said(code, said)))

    def embed(self, prompts: Sequence[str | Sequence[int]], pooling: str = "mean", *,
              priority: int = 0) -> list[tuple[float, ...]]:
        """A vector for each text: the model's hidden states, pooled.

        Args:
          prompts: texts, or token ids that are used as they are; 64 at once, at most.
          pooling: "mean" or "last".
          priority: as of `generate`.

        Raises:
          UserError: an argument does not fit its field (a `WrongType` if it is of another type).
          RequestFailed: the server refused the request or could not finish it.
        """
        check_type("prompts", prompts, Sequence[str | Sequence[int]])
        check_type("pooling", pooling, str)
        check_type("priority", priority, int)
        if pooling not in _POOLINGS:
            raise UserError(f"pooling must be one of {', '.join(_POOLINGS)}, not {pooling!r}")
        with checked():
            request = messages.EmbedRequest(pooling=_POOLINGS[pooling], priority=priority)
            for prompt in prompts:
                set_prompt(request.inputs.add(), prompt)
        answer = self._call(messages.INFERENCE, "Embed", request, messages.EmbedResponse, wait=True)
        return [tuple(one.values) for one in answer.embeddings]

    def decode(self, prompt: str | Sequence[int], *, max_tokens: int = 0, num_samples: int = 1, has_bos: bool = False,
               priority: int = 0) -> Iterator[Chunk]:
        """`generate` over the JetStream protocol, which leaves sampling to the server and says nothing at the end."""
        check_type("prompt", prompt, str | Sequence[int])
        for name, value in {"max_tokens": max_tokens, "num_samples": num_samples, "priority": priority}.items():
            check_type(name, value, int)
        check_type("has_bos", has_bos, bool)
        with checked():
            request = messages.DecodeRequest(max_tokens=max_tokens, num_samples=num_samples, has_bos=has_bos,
                                             priority=priority)
            if isinstance(prompt, str):
                request.text_content.text = prompt
            else:
                request.token_content.token_ids.extend(prompt)
                request.token_content.SetInParent()
        return self._decoded(request)

    def _generated(self, request: Any) -> Iterator[Chunk]:
        for response in self._stream(messages.INFERENCE, "Generate", request, messages.GenerateResponse):
            yield chunk(response)

    def _decoded(self, request: Any) -> Iterator[Chunk]:
        for response in self._stream(messages.ORCHESTRATOR, "Decode", request, messages.DecodeResponse):
            for index, sample in enumerate(response.stream_content.samples):
                if sample.text or sample.token_ids:
                    yield Chunk(sample=index, text=sample.text, token_ids=tuple(sample.token_ids))

    def _call(self, service: str, method: str, request, answer: Any, wait: bool = False):
        call = self._channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        try:
            return call(request, timeout=self._timeout_s or (None if wait else CONNECT_TIMEOUT_S),
                        metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def _stream(self, service: str, method: str, request, answer: Any) -> Iterator:
        start = self._channel.unary_stream(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        call = start(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._failure(error) from None
        finally:
            call.cancel()

    def _failure(self, error: grpc.RpcError) -> RequestFailed:
        code = error.code()
        request_id = dict(error.initial_metadata() or ()).get("x-request-id", "")
        return RequestFailed(code, self._said(code, error.details()), request_id)

    def _said(self, code: grpc.StatusCode, details: str) -> str:
        return f"{self._address} answered {code.name}: {details}"


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if api_key is None:
        return ()
    if not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UserError("the API key must be printable ASCII without spaces around it")
    return (("authorization", f"Bearer {api_key}"),)


def _contents(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 after an error that was told in one line, 130 after Ctrl-C."""
    from serving import client_command

    return client_command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
