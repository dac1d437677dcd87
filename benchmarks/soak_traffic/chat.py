"""Good requests that talk with the model: chat, calls of tools, and responses, in one piece, streamed and later."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from benchmarks.soak_traffic.asker import LENGTHS, NEAR, STALL_S, Asker, Wrong, chat_body, user

SECOND = "go on"  # what is said to any answer
SHORT = min(LENGTHS)
ANSWER = '{"度": 21}'  # what the tool gives back
CALL_TOKENS = 300
SCHEMA = {"type": "object", "properties": {"天": {"type": "integer", "minimum": 1, "maximum": 40},
                                           "unit": {"enum": ["度", "K"]}},
          "required": ["天", "unit"], "additionalProperties": False}
TOOL = {"name": "weather", "parameters": SCHEMA}
TOOLS = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required", "parallel_tool_calls": False}


async def chat(ask: Asker) -> None:
    prompt, length = ask.pick_chat()
    answer = await ask.post("/v1/chat/completions", chat_body([user(prompt)], length))
    (choice,) = answer["choices"]
    ask.same(choice["message"]["content"], ask.known.chats[prompt, length], prompt)
    if answer["usage"]["completion_tokens"] != length:
        raise Wrong(f"usage of {answer}")


async def chat_stream(ask: Asker) -> None:
    prompt, length = ask.pick_chat()
    text, reasons = await _streamed(ask, chat_body([user(prompt)], length))
    ask.same(text, ask.known.chats[prompt, length], prompt)
    if reasons != ["length"]:
        raise Wrong(f"a chat's stream ended with {reasons}")


async def tool_call(ask: Asker) -> None:
    """A call, in one piece or streamed, and the answer to what the tool gives back."""
    prompt = ask.random.choice(list(ask.known.calls))
    arguments, after = ask.known.calls[prompt]
    sent = chat_body([user(prompt)], CALL_TOKENS, **TOOLS)
    if ask.random.random() < 0.5:
        message = (await ask.post("/v1/chat/completions", sent))["choices"][0]["message"]
        (call,) = message["tool_calls"]
        ask.same(call["function"]["arguments"], arguments, prompt)
        answer = await ask.post("/v1/chat/completions", _after(prompt, arguments))
        ask.same(answer["choices"][0]["message"]["content"], after, prompt)
    else:
        text, reasons = await _streamed(ask, sent)
        ask.same(text, arguments, prompt)
        if reasons != ["tool_calls"]:
            raise Wrong(f"a call's stream ended with {reasons}")


async def response(ask: Asker) -> None:
    """A response, the one that follows it, and what is kept of both, which is deleted."""
    prompt = ask.random.choice(list(ask.known.follow_ups))
    first = await ask.post("/v1/responses", _response(prompt, SHORT))
    ask.same(_text(first), ask.known.chats[prompt, SHORT], prompt)
    second = await ask.post("/v1/responses", _response(SECOND, SHORT, previous_response_id=first["id"]))
    ask.same(_text(second), ask.known.follow_ups[prompt], prompt)
    client = ask.doors.client
    for one in (first, second):
        kept = ask.good(await client.get(f"/v1/responses/{one['id']}"))
        if kept["output"] != one["output"]:
            raise Wrong(f"what was kept is {kept}, not {one}")
        ask.good(await client.delete(f"/v1/responses/{one['id']}"))
        if (await client.get(f"/v1/responses/{one['id']}")).status_code != 404:
            raise Wrong("a response was deleted and is there")


async def response_stream(ask: Asker) -> None:
    prompt, length = ask.pick_chat()
    pieces, kinds = "", []
    async for event in ask.events("/v1/responses", _response(prompt, length, store=False)):
        if event["sequence_number"] != len(kinds):
            raise Wrong(f"event {len(kinds)} has the number {event['sequence_number']}")
        kinds.append(event["type"])
        if event["type"] == "response.output_text.delta":
            pieces += event["delta"]
    if kinds[0] != "response.created" or kinds[-1] != "response.incomplete":  # cut off at max_output_tokens
        raise Wrong(f"the events of a response are {kinds}")
    ask.same(pieces, ask.known.chats[prompt, length], prompt)
    ask.same(_text(event["response"]), pieces, prompt)


async def response_call(ask: Asker) -> None:
    prompt = ask.random.choice(list(ask.known.calls))
    answer = await ask.post("/v1/responses", _response(
        prompt, CALL_TOKENS, store=False, tools=[{"type": "function", **TOOL}], tool_choice="required",
        parallel_tool_calls=False))
    (call,) = answer["output"]
    if answer["status"] != "completed" or call["type"] != "function_call":
        raise Wrong(f"instead of a call: {answer}")
    ask.same(call["arguments"], ask.known.calls[prompt][0], prompt)


async def response_in_background(ask: Asker) -> None:
    prompt, length = ask.pick_chat()
    client, made = ask.doors.client, await ask.post("/v1/responses", _response(prompt, length, background=True))
    path = f"/v1/responses/{made['id']}"
    async with asyncio.timeout(STALL_S):
        while (made := ask.good(await client.get(path)))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.1)
    ask.same(_text(made), ask.known.chats[prompt, length], prompt)
    ask.good(await client.delete(path))


async def learn(ask: Asker, prompt: str) -> None:
    """Notes what the model answers to `prompt` as a message, where that is the same in any company."""
    known = ask.known
    whole = await _certain(ask, [user(prompt)], max(LENGTHS))
    if whole is None:
        return
    for length in LENGTHS:
        answer = await ask.post("/v1/chat/completions", chat_body([user(prompt)], length))
        known.chats[prompt, length] = answer["choices"][0]["message"]["content"]
    short = {"role": "assistant", "content": known.chats[prompt, SHORT]}
    second = await _certain(ask, [user(prompt), short, user(SECOND)], SHORT)
    if second is not None:
        known.follow_ups[prompt] = second
    sent = chat_body([user(prompt)], CALL_TOKENS, **TOOLS)
    (choice,) = (await ask.post("/v1/chat/completions", sent))["choices"]
    if choice["finish_reason"] == "tool_calls":
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        value = json.loads(arguments)
        if not (set(value) == {"天", "unit"} and 1 <= value["天"] <= 40 and value["unit"] in ("度", "K")):
            raise Wrong(f"a call's arguments are {arguments!r}")
        after = await _certain(ask, _after(prompt, arguments)["messages"], SHORT)
        if after is not None:
            known.calls[prompt] = arguments, after


async def _certain(ask: Asker, said: list[dict[str, Any]], length: int) -> str | None:
    """The answer to a conversation; None if it may be another one in other company."""
    answer = await ask.post("/v1/chat/completions", chat_body(said, length, logprobs=True, top_logprobs=2))
    (choice,) = answer["choices"]
    tops = [[one["logprob"] for one in token["top_logprobs"]] for token in choice["logprobs"]["content"]]
    return None if any(first - second < NEAR for first, second in tops) else choice["message"]["content"]


def _after(prompt: str, arguments: str) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": TOOL["name"], "arguments": arguments}}
    return chat_body([user(prompt), {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "tool_call_id": "call_1", "content": ANSWER}], SHORT)


async def _streamed(ask: Asker, sent: dict[str, Any]) -> tuple[str, list[str]]:
    """The content of an answer, or the arguments of its one call; and how it ended."""
    text, reasons, done = "", [], 0
    async for event in ask.events("/v1/chat/completions", sent):
        if done:
            raise Wrong("something follows [DONE]")
        if event == "[DONE]":
            done += 1
            continue
        (choice,) = event["choices"]
        text += choice["delta"].get("content") or ""
        text += "".join(call["function"]["arguments"] for call in choice["delta"].get("tool_calls") or ())
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    if done != 1:
        raise Wrong("a stream ended without [DONE]")
    return text, reasons


def _response(prompt: str, length: int, **more: object) -> dict[str, Any]:
    return {"model": "model", "input": prompt, "max_output_tokens": length, "temperature": 0, "ignore_eos": True,
            **more}


def _text(found: dict[str, Any]) -> str:
    return "".join(part["text"] for item in found["output"] for part in item["content"])


GOOD = (chat, chat_stream, tool_call, response, response_stream, response_call, response_in_background)
