"""A batch over a real engine whose rows it fills: a request from outside goes first, as if it were alone."""

from __future__ import annotations

import json

import openai
import pytest

from serving.state import State
from tests.serving.conftest import MAX_ROWS
from tests.serving.doubles import wait_until
from tests.serving.http.conftest import MODEL, RunningApp

LINES, LONG, SHORT = 3 * MAX_ROWS, 300, 60  # tokens of a line, and of a request from outside
SOME = 20  # steps, of those that a request takes: for the turn under way, and prompts of lines between its own


@pytest.fixture
def client(service, tmp_path):
    state = State(tmp_path / "state")
    running = RunningApp(service, MODEL, {}, {"state": state})
    try:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
            yield found
    finally:
        running.stop()
        state.close()
    assert wait_until(lambda: not any(service.stats()[name] for name in ("pages_used", "running", "waiting")))


@pytest.fixture
def ended(service, monkeypatch):
    """(tokens, steps from its arrival to its end) of each request, in the order in which they end."""
    submit, found = service.submit_samples, []

    def spied(prompt_ids, params, listeners, priority=0, **more):
        arrived = service.stats()["steps"]

        def told(listener):
            def tell(delta):
                if delta.finish_reason is not None:
                    found.append((params[0].max_tokens, service.stats()["steps"] - arrived))
                listener(delta)

            return tell

        return submit(prompt_ids, params, [told(one) for one in listeners], priority, **more)

    monkeypatch.setattr(service, "submit_samples", spied)
    return found


def asked(prompt: str, max_tokens: int) -> dict:
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "extra_body": {"ignore_eos": True}}


def test_a_request_does_not_wait_for_a_batch_that_fills_the_engine(client, service, ended):
    alone = client.completions.create(**asked("import os", SHORT)).choices[0].text
    line = client.completions.create(**asked("def main", LONG)).choices[0].text
    (_, steps_alone), _ = ended
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions",
              "body": {name: value for name, value in asked("def main", LONG).items() if name != "extra_body"}
              | {"ignore_eos": True}} for i in range(LINES)]
    stored = client.files.create(file=("a.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=stored.id, endpoint="/v1/completions", completion_window="24h")
    assert wait_until(lambda: service.stats()["running"] == MAX_ROWS)  # no row is free
    del ended[:]
    assert client.completions.create(**asked("import os", SHORT)).choices[0].text == alone
    lengths = [length for length, _ in ended]
    (steps,) = (steps for length, steps in ended if length == SHORT)
    # A line that was under way may have ended meanwhile; none has ended that was not, though all were there before.
    assert steps <= steps_alone + SOME and steps_alone + SOME < LONG
    assert lengths.index(SHORT) < MAX_ROWS and len(lengths) < LINES
    assert wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
    output = client.files.content(client.batches.retrieve(batch.id).output_file_id).text.splitlines()
    answers = [json.loads(one) for one in output]
    assert [one["custom_id"] for one in answers] == [str(i) for i in range(LINES)]  # the one that gave way, too
    assert {one["response"]["body"]["choices"][0]["text"] for one in answers} == {line}
