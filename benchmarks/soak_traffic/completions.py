"""Good requests that go on with a text: over HTTP, both services of gRPC, a session and a WebSocket; and embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

from benchmarks.soak_traffic.asker import LENGTHS, NEAR, OK, STALL_S, Asker, Wrong, body, chat_body, request, user
from serving import messages


async def http(ask: Asker) -> None:
    prompt, length = ask.pick()
    answer = await ask.post("/v1/completions", body(prompt, length))
    ask.check(prompt, length, answer["choices"][0]["text"])
    if len(answer["choices"]) != 1 or answer["usage"]["completion_tokens"] != length:
        raise Wrong(f"choices or usage of {answer}")


async def http_stream(ask: Asker, pause_s: float = 0.0) -> None:
    prompt, length = ask.pick()
    text, finished, done = "", 0, 0
    async for event in ask.events("/v1/completions", body(prompt, length)):
        await asyncio.sleep(pause_s * ask.random.random())
        if done:
            raise Wrong("something follows [DONE]")
        if event == "[DONE]":
            done += 1
            continue
        (choice,) = event["choices"]
        text += choice["text"]
        finished += choice["finish_reason"] is not None
    if (finished, done) != (1, 1):
        raise Wrong(f"a stream ended {finished} times, with [DONE] {done} times")
    ask.check(prompt, length, text)


async def grpc_generate(ask: Asker, pause_s: float = 0.0) -> None:
    prompt, length = ask.pick()
    text, finished = "", 0
    async for response in ask.generate(request(prompt, length), OK):
        await asyncio.sleep(pause_s * ask.random.random())
        text += response.text
        finished += response.finish_reason != 0
    if finished != 1:
        raise Wrong(f"a stream ended {finished} times")
    ask.check(prompt, length, text)


async def grpc_decode(ask: Asker) -> None:
    prompt, length = ask.pick()
    sent = messages.DecodeRequest(max_tokens=length)
    sent.text_content.text = prompt
    decode = ask.doors.channel.unary_stream(
        f"/{messages.ORCHESTRATOR}/Decode", request_serializer=messages.DecodeRequest.SerializeToString,
        response_deserializer=messages.DecodeResponse.FromString)
    text, count = "", 0
    async for response in decode(sent, metadata=ask.metadata(OK), timeout=STALL_S):
        text += response.stream_content.samples[0].text
        count += len(response.stream_content.samples[0].token_ids)
    # The model may end before the length here, where nobody can ask it to go on, perhaps within a character.
    if count > length or not ask.known.texts[prompt, max(LENGTHS)].startswith(text.rstrip("\ufffd")):
        raise Wrong(f"Decode said {text!r} to {prompt!r}")


async def grpc_session(ask: Asker) -> None:
    """Three requests on one call, and a fourth that is cancelled; each ends once."""
    picked = {name: ask.pick() for name in "abcd"}
    texts, ended = dict.fromkeys(picked, ""), dict.fromkeys(picked, "")
    call = ask.session(OK)
    for name, (prompt, length) in picked.items():
        await call.write(messages.SessionRequest(id=name, start=request(prompt, length)))
    await call.write(messages.SessionRequest(id="d", cancel=messages.Cancel()))
    await call.done_writing()
    async for response in call:
        if ended.get(response.id, "?"):
            raise Wrong(f"a session says more of {response.id!r} after its end")
        kind = response.WhichOneof("kind")
        if kind == "response":
            texts[response.id] += response.response.text
        else:
            ended[response.id] = kind
    if [ended[name] for name in "abc"] != ["done"] * 3 or not ended["d"]:
        raise Wrong(f"the requests of a session ended with {ended}")
    for name, (prompt, length) in picked.items():
        if ended[name] == "done":
            ask.check(prompt, length, texts[name])


async def websocket(ask: Asker) -> None:
    """Two texts and, of a model that talks, a conversation on one connection."""
    picked = {str(i): ask.pick() for i in range(3)}
    sent: dict[str, dict[str, Any]] = {name: body(*one) for name, one in picked.items()}
    wanted = {name: ask.known.texts[one] for name, one in picked.items()}
    if ask.known.chats:
        picked["2"] = ask.pick_chat()
        sent["2"], wanted["2"] = chat_body([user(picked["2"][0])], picked["2"][1]), ask.known.chats[picked["2"]]
    texts, ended = dict.fromkeys(picked, ""), dict.fromkeys(picked, 0)
    async with ask.websocket() as socket:
        for name, one in sent.items():
            await socket.send(json.dumps({"type": "start", "id": name, **one}))
        while not all(ended.values()):
            message = json.loads(await asyncio.wait_for(socket.recv(), STALL_S))
            if message["type"] == "delta":
                texts[message["id"]] += message["text"]
            elif message["type"] == "done":
                ended[message["id"]] += 1
                ask.known.sent[message["request_id"]] = OK
            else:
                raise Wrong(f"WebSocket: {message}")
    for name, text in texts.items():
        ask.same(text, wanted[name], picked[name][0])
    if max(ended.values()) > 1:
        raise Wrong(f"requests of a WebSocket ended {ended} times")


async def embed_http(ask: Asker) -> None:
    prompt, _ = ask.pick()
    answer = await ask.post("/v1/embeddings", {"model": "model", "input": prompt, "encoding_format": "base64"})
    ask.check_vector(prompt, [x for (x,) in struct.iter_unpack("<f", base64.b64decode(answer["data"][0]["embedding"]))])


async def embed_grpc(ask: Asker) -> None:
    prompt, _ = ask.pick()
    sent = messages.EmbedRequest()
    sent.inputs.add(text=prompt)
    embed = ask.doors.channel.unary_unary(
        f"/{messages.INFERENCE}/Embed", request_serializer=messages.EmbedRequest.SerializeToString,
        response_deserializer=messages.EmbedResponse.FromString)
    answer = await embed(sent, metadata=ask.metadata(OK), timeout=STALL_S)
    ask.check_vector(prompt, list(answer.embeddings[0].values))


async def learn(ask: Asker, prompt: str) -> None:
    """Notes how the model goes on with `prompt`, and its embedding, if that is the same in any company."""
    sent = request(prompt, max(LENGTHS))
    sent.sampling.top_logprobs = 2
    async for response in ask.generate(sent):
        if any(top.logprobs[0] - top.logprobs[1] < NEAR for top in response.top_logprobs):
            return
    answer = await ask.post("/v1/embeddings", {"model": "model", "input": prompt})
    ask.known.embeddings[prompt] = answer["data"][0]["embedding"]
    for length in LENGTHS:
        answer = await ask.post("/v1/completions", body(prompt, length))
        ask.known.texts[prompt, length] = answer["choices"][0]["text"]


GOOD = (http, http_stream, grpc_generate, grpc_decode, grpc_session, websocket, embed_http, embed_grpc)
