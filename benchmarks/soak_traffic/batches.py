"""Batches, which run behind all the others: to their end, or cancelled on the way."""

from __future__ import annotations

import asyncio
import collections
import json
from typing import Any

from benchmarks.soak_traffic.asker import OK, Asker, Wrong, body, chat_body, user
from benchmarks.soak_traffic.files import upload

BATCH_S = 600.0  # in which one must have ended, whoever goes first
LINES = 6
ENDED = ("completed", "failed", "expired", "cancelled")


async def batch(ask: Asker) -> None:
    """One of completions, conversations or embeddings, with a line that must be refused."""
    await _run(ask, cancel=False)


async def batch_cancelled(ask: Asker) -> None:
    """One that is cancelled: every line is answered, or said to be cancelled."""
    await _run(ask, cancel=True)


async def _run(ask: Asker, cancel: bool) -> None:
    endpoints = ["/v1/completions", "/v1/embeddings", *(["/v1/chat/completions"] if ask.known.chats else [])]
    endpoint = ask.random.choice(endpoints)
    picked = {f"第{i}行": ask.pick_chat() if "chat" in endpoint else ask.pick() for i in range(LINES)}
    bodies = {name: _body(endpoint, *one) for name, one in picked.items()} | {"wrong": {"model": "model", "no": 1}}
    lines = [{"custom_id": name, "method": "POST", "url": endpoint, "body": one} for name, one in bodies.items()]
    stored = await upload(ask, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    made = await ask.post("/v1/batches", {"input_file_id": stored["id"], "endpoint": endpoint,
                                          "completion_window": "24h"})
    path, client = f"/v1/batches/{made['id']}", ask.doors.client
    if cancel:
        await asyncio.sleep(ask.random.random())
        answer = await client.post(f"{path}/cancel")
        if answer.status_code != 409:  # it has ended meanwhile
            ask.good(answer)
    while (made := ask.good(await client.get(path)))["status"] not in ENDED:
        await asyncio.sleep(0.25)
    if made["status"] != "completed" and not (cancel and made["status"] == "cancelled"):
        raise Wrong(f"a batch ended so: {made}")
    good, bad = [await _lines(ask, made[name]) for name in ("output_file_id", "error_file_id")]
    named = collections.Counter(line["custom_id"] for line in (*good, *bad))
    if named != collections.Counter(list(bodies)):
        raise Wrong(f"lines of a batch were answered so often: {named}")
    if not cancel and [line["custom_id"] for line in bad] != ["wrong"]:
        raise Wrong(f"lines of a batch failed: {bad}")
    for line in good:
        ask.known.sent[line["response"]["request_id"]] = OK
        _check(ask, endpoint, *picked[line["custom_id"]], line["response"]["body"])
    for name in (stored["id"], made["output_file_id"], made["error_file_id"]):
        if name:
            ask.good(await client.delete(f"/v1/files/{name}"))


def _body(endpoint: str, prompt: str, length: int) -> dict[str, Any]:
    if endpoint == "/v1/embeddings":
        return {"model": "model", "input": prompt}
    return body(prompt, length) if endpoint == "/v1/completions" else chat_body([user(prompt)], length)


def _check(ask: Asker, endpoint: str, prompt: str, length: int, answer: dict[str, Any]) -> None:
    if endpoint == "/v1/embeddings":
        ask.check_vector(prompt, answer["data"][0]["embedding"])
    elif endpoint == "/v1/completions":
        ask.check(prompt, length, answer["choices"][0]["text"])
    else:
        ask.same(answer["choices"][0]["message"]["content"], ask.known.chats[prompt, length], prompt)


async def _lines(ask: Asker, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    answer = await ask.doors.client.get(f"/v1/files/{file_id}/content")
    if answer.status_code != 200:
        raise Wrong(f"a batch's file was answered with {answer.status_code}")
    return [json.loads(line) for line in answer.text.splitlines()]


BATCHES = (batch, batch, batch_cancelled)
