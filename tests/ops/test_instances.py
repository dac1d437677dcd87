"""Three instances behind nginx as serving/deploy configures it: killed, drained, swapped, under load."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import grpc
import httpx
import openai
import pytest
from websockets.sync.client import connect

from benchmarks.fleet import Fleet
from benchmarks.instances import Load, ask_each, lost_needlessly, scenario
from serving import messages

MAX_TOKENS = 40  # at 5 ms each
PROMPTS = ("def main(", "从前有一座山", "abc")


@pytest.fixture
def fleet(tmp_path):
    with Fleet(tmp_path, lambda n, port, http_port: [sys.executable, "-m", "tests.ops.instance", str(port),
                                                     str(http_port)]) as running:
        yield running


def body(prompt="abc", **more) -> dict:
    return {"model": "model", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, **more}


def test_kill_drain_and_swap_under_load(fleet):
    """What clients see that retry nothing: only streams that ran on the killed instance are lost."""
    load = Load(fleet, ask_each(fleet, PROMPTS, MAX_TOKENS), clients=12, max_tokens=MAX_TOKENS)
    phases = asyncio.run(scenario(fleet, load, 7.0, print))
    assert lost_needlessly(phases) == []
    assert all(phase["requests"] > 100 for phase in phases.values())
    killed = phases["one killed"]
    cut = [count for kind in ("http stream", "grpc stream") for result, count in killed[kind].items() if result != "ok"]
    assert sum(cut) >= 1  # it was under load, and nobody says that all went well
    assert killed["last_failure_s"] < 5.0
    # Out of rotation at once: after the first second it is tried now and then with one request, which goes elsewhere.
    assert len([at for at in killed["tries_of_the_dead"] if at > 1.0]) <= 2
    assert phases["one drained"]["exit_status"] == 0 and phases["one drained"]["drained_in_s"] < 20.0


def test_a_killed_instance_costs_its_clients_a_clear_error(fleet):
    """A stream that has begun ends in an error that its library counts as one of the connection; so does gRPC's."""
    for n in (2, 3):
        fleet.kill(n)
    client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0)
    events = client.completions.create(stream=True, **(body() | {"max_tokens": 2000}))
    assert next(iter(events)).choices[0].text
    with grpc.insecure_channel(fleet.grpc_address) as channel:
        generate = channel.unary_stream(f"/{messages.INFERENCE}/Generate",
                                        request_serializer=messages.GenerateRequest.SerializeToString,
                                        response_deserializer=messages.GenerateResponse.FromString)
        request = messages.GenerateRequest(text="abc")
        request.sampling.max_tokens = 2000
        call = generate(request)
        next(call)
        fleet.kill(1)
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            for _ in events:
                pass
        with pytest.raises(grpc.RpcError) as error:
            for _ in call:
                pass
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
        # Nobody is left: each protocol's own error, which says to try again.
        with pytest.raises(grpc.RpcError) as error:
            list(generate(request))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details() == "no instance of the server can be reached; try again"
    answer = httpx.post(f"{fleet.url}/v1/completions", json=body())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and answer.headers["x-request-id"]
    assert answer.json()["error"]["code"] == "unavailable"
    with pytest.raises(openai.InternalServerError):  # which the library retries, if it may
        client.completions.create(**body())


def test_a_call_is_finished_by_another_instance(fleet):
    """Of four non-streaming calls some run on the killed instance; all are answered, and the client retries nothing."""
    answers = []

    def ask():
        with httpx.Client(timeout=30) as client:
            answers.append(client.post(f"{fleet.url}/v1/completions", json=body(max_tokens=200)).json())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    fleet.kill(1)
    for thread in threads:
        thread.join()
    assert [len(answer["choices"][0]["text"]) for answer in answers] == [200] * 6
    assert [outcome for _, outcome in fleet.tries(1) if outcome == "502"]  # it was tried, and died of it


def test_what_creates_something_is_not_sent_twice(fleet):
    """An upload that runs on an instance when it dies fails: nobody knows whether it was taken."""
    answers = []

    def upload():
        def slowly():
            yield b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            time.sleep(1.0)
            yield b"--x--\r\n"

        answers.append(httpx.post(f"{fleet.url}/v1/files", content=slowly(), timeout=30,
                                  headers={"content-type": "multipart/form-data; boundary=x"}))

    thread = threading.Thread(target=upload)
    thread.start()
    time.sleep(0.5)
    for n in fleet.numbers:  # whichever has it
        fleet.kill(n)
    thread.join()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "unavailable"
    assert sum(len([1 for _, outcome in fleet.tries(n) if outcome == "502"]) for n in fleet.numbers) == 1


def test_a_stream_arrives_as_it_is_made(fleet):
    """Nothing is collected on the way: the first event comes long before the last, over HTTP and over WebSocket."""
    began = time.monotonic()
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body(max_tokens=200, stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        first = time.monotonic() - began
        for _ in lines:
            pass
    assert first < (time.monotonic() - began) / 3
    with connect(f"ws://127.0.0.1:{fleet.http_port}/v1/stream") as socket:
        socket.send('{"type": "start", "id": "1", "prompt": "abc", "max_tokens": 40}')
        assert '"id"' in socket.recv(timeout=10)


def test_ids_and_limits_go_through(fleet):
    answer = httpx.post(f"{fleet.url}/v1/completions", json=body(), headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert len(httpx.get(f"{fleet.url}/v1/models").headers["x-request-id"]) >= 16  # nginx's, and the instance's too
    assert httpx.get(f"{fleet.url}/metrics").status_code == 404
    assert httpx.get(f"http://{fleet.http_address(1)}/metrics").status_code == 200
    large = httpx.post(f"{fleet.url}/v1/completions", content=b"{" + b" " * (65 << 20) + b"}", timeout=30)
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
