"""Requests that must be refused in their protocol's own way."""

from __future__ import annotations

import json

import grpc

from benchmarks.soak_traffic.asker import LENGTHS, Asker, Wrong, body, chat_body, request, user
from serving import messages

STATUSES = 400, 404, 405, 413, 422
BAD = {
    "/v1/completions": (
        b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "model"}', b'{"model": "model", "prompt": {}}',
        b'{"model": "model", "prompt": "a", "max_tokens": -1}', b'{"model": "model", "prompt": "a", "max_tokns": 1}',
        b'{"model": "model", "prompt": "a", "temperature": "hot"}', b'{"model": "another", "prompt": "a"}',
        b'{"model": "model", "prompt": "a", "n": 100000}', b'{"model": "model", "prompt": [[1], [-5]]}'),
    "/v1/chat/completions": (
        b'{"model": "model"}', b'{"messages": []}', b'{"messages": [{"role": "nobody", "content": "a"}]}',
        b'{"messages": [{"role": "tool", "tool_call_id": "x", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
    "/v1/responses": (b'{"input": 5}', b'{"input": "a", "previous_response_id": "resp_none"}',
                      b'{"input": "a", "max_output_tokens": -1}', b'{"input": "a", "conversation": "b"}'),
    "/v1/embeddings": (b'{"input": []}', b'{"input": "a", "dimensions": 3}'),
    "/v1/batches": (b'{"input_file_id": "file-none", "endpoint": "/v1/completions", "completion_window": "24h"}',
                    b'{"input_file_id": "file-none", "endpoint": "/metrics", "completion_window": "24h"}'),
    "/v1/files": (b"{}",),
}


async def malformed_http(ask: Asker) -> None:
    path = ask.random.choice(list(BAD))
    content = ask.random.choice(BAD[path])
    answer = await ask.doors.client.post(path, content=content, headers={"content-type": "application/json"})
    if answer.status_code not in STATUSES or "message" not in answer.json()["error"]:
        raise Wrong(f"{content!r} to {path} was answered with {answer.status_code} {answer.text[:200]}")


async def malformed_grpc(ask: Asker) -> None:
    bad = request(ask.pick()[0], 4)
    ask.random.choice((
        lambda: setattr(bad.sampling, "max_tokens", -1), lambda: setattr(bad.sampling, "temperature", float("nan")),
        lambda: bad.ClearField("text"), lambda: bad.token_ids.ids.extend([2**31 - 1]),
        lambda: setattr(bad.sampling, "regex", "(")))()
    sent = ask.random.choice((bad, ask.random.randbytes(30) + b"\xff"))
    await _refused(ask, sent)


async def malformed_session(ask: Asker) -> None:
    """A message that is none fails by itself; the request beside it is answered."""
    prompt, length = ask.pick()
    call = ask.session()
    await call.write(messages.SessionRequest(id="a", start=request(prompt, length)))
    await call.write(messages.SessionRequest(id="", start=request(prompt, length)))
    await call.done_writing()
    text, failed, done = "", 0, 0
    async for response in call:
        failed += response.HasField("failure")
        done += response.HasField("done")
        text += response.response.text
    if (failed, done) != (1, 1):
        raise Wrong(f"in a session {failed} messages failed and {done} requests were done")
    ask.check(prompt, length, text)


async def malformed_websocket(ask: Asker) -> None:
    """A message that is none fails by itself; the request beside it is answered."""
    prompt, length = ask.pick()
    bad = ask.random.choice(("{", "[]", '{"type": "dance"}', '{"type": "start", "id": "b"}'))
    text, errors = "", 0
    async with ask.websocket() as socket:
        await socket.send(json.dumps({"type": "start", "id": "a", **body(prompt, length)}))
        await socket.send(bad)
        while True:
            message = json.loads(await socket.recv())
            errors += message["type"] == "error"
            text += message.get("text", "")
            if message["type"] == "done":
                break
    if errors != 1:
        raise Wrong(f"{bad!r} got {errors} errors")
    ask.check(prompt, length, text)


async def oversized_http(ask: Asker) -> None:
    text = "a b" * ask.random.choice((100_000, 3_000_000))
    path, sent = ask.random.choice((("/v1/completions", body(text, min(LENGTHS))),
                                    ("/v1/chat/completions", chat_body([user(text)], min(LENGTHS)))))
    answer = await ask.doors.client.post(path, json=sent)
    if answer.status_code not in (400, 413):
        raise Wrong(f"{len(text)} characters to {path} were answered with {answer.status_code}")


async def oversized_grpc(ask: Asker) -> None:
    await _refused(ask, request("a b" * 200_000, 4))


async def _refused(ask: Asker, sent: object) -> None:
    try:
        async for _ in ask.generate(sent):
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise Wrong(f"{str(sent)[:100]!r} ended with {error.code()}: {error.details()}") from None
    else:
        raise Wrong(f"{str(sent)[:100]!r} was answered")


MALFORMED = (malformed_http, malformed_http, malformed_grpc, malformed_session, malformed_websocket)
OVERSIZED = (oversized_http, oversized_grpc)
