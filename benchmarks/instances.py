"""Several instances behind nginx under load, while one is killed, one drained and all get another model.

    python -m benchmarks.instances                                # three instances of a tiny model, about two minutes
    python -m benchmarks.instances --run_dir=runs/a --next_run_dir=runs/b --clients=24 --seconds=30

Needs Debian's nginx. Every answer is checked: greedy, it must be what the model gave before anything happened (during
the swap, what either model gives). Clients retry nothing, so what they see is what nginx could not mend. Everything
listens on loopback, and all of it shares this machine's cores: read the counts, not the speed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc
import httpx

from benchmarks import report
from benchmarks.fleet import READY_S, Fleet, make_run, serve_command
from serving import messages
from serving.deploy import swap


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a client saw of one request: "ok", "cut" (it had begun), "wrong", or how it was refused."""

    kind: str
    began: float
    ended: float
    result: str


KINDS = ("http", "http stream", "grpc stream")


class Load:
    """Clients that ask one thing after another until `stop`.

    Args:
      fleet: asked through nginx.
      answers: what each prompt may be answered with; may grow while this runs.
      clients: how many at a time, of the kinds in turn.
      max_tokens: of each completion.
    """

    def __init__(self, fleet: Fleet, answers: Mapping[str, set[str]], clients: int, max_tokens: int) -> None:
        self.outcomes: list[Outcome] = []
        self._fleet = fleet
        self._answers = answers
        self._clients = clients
        self._max_tokens = max_tokens
        self._stopping = False

    async def run(self) -> None:
        """Until `stop`; a request that runs then is waited for."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (httpx.AsyncClient(base_url=self._fleet.url, timeout=60, limits=limits) as client,
                    grpc.aio.insecure_channel(self._fleet.grpc_address) as channel):
            generate = channel.unary_stream(f"/{messages.INFERENCE}/Generate",
                                            request_serializer=messages.GenerateRequest.SerializeToString,
                                            response_deserializer=messages.GenerateResponse.FromString)
            ask = {"http": lambda p: self._http(client, p), "http stream": lambda p: self._stream(client, p),
                   "grpc stream": lambda p: self._grpc(generate, p)}
            await asyncio.gather(*(self._one(KINDS[i % len(KINDS)], ask, i) for i in range(self._clients)))

    def stop(self) -> None:
        self._stopping = True

    async def _one(self, kind: str, ask: Mapping[str, Callable], number: int) -> None:
        prompts = list(self._answers)
        while not self._stopping:
            prompt = prompts[number % len(prompts)]
            number += 1
            began = time.time()
            result = await ask[kind](prompt)
            self.outcomes.append(Outcome(kind, began, time.time(), result))
            if result != "ok":
                await asyncio.sleep(0.05)

    def _checked(self, prompt: str, text: str) -> str:
        return "ok" if text in self._answers[prompt] else "wrong"

    def _body(self, prompt: str, **more: object) -> dict:
        return {"model": "model", "prompt": prompt, "max_tokens": self._max_tokens, "temperature": 0,
                "ignore_eos": True, **more}

    async def _http(self, client: httpx.AsyncClient, prompt: str) -> str:
        try:
            answer = await client.post("/v1/completions", json=self._body(prompt))
        except httpx.HTTPError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}"
        return self._checked(prompt, answer.json()["choices"][0]["text"])

    async def _stream(self, client: httpx.AsyncClient, prompt: str) -> str:
        text, done = "", False
        try:
            async with client.stream("POST", "/v1/completions", json=self._body(prompt, stream=True)) as answer:
                if answer.status_code != 200:
                    return f"HTTP {answer.status_code}"
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            return "cut"
                        text += "".join(choice["text"] for choice in event["choices"])
        except httpx.HTTPError as error:
            return "cut" if text else type(error).__name__
        return self._checked(prompt, text) if done else "wrong"

    async def _grpc(self, generate: Callable, prompt: str) -> str:
        request = messages.GenerateRequest(text=prompt)
        request.sampling.max_tokens = self._max_tokens
        request.sampling.temperature = 0
        request.sampling.ignore_eos = True
        text = ""
        try:
            async for response in generate(request, timeout=60):
                text += response.text
        except grpc.aio.AioRpcError as error:
            # Its answer begins with the request's id, long before a token: from then on nobody else can give it.
            began = error.code() is grpc.StatusCode.INTERNAL and "x-request-id" in dict(error.initial_metadata() or ())
            return f"cut ({error.code().name})" if text or began else error.code().name
        return self._checked(prompt, text)


def summary(outcomes: Sequence[Outcome], since: float, until: float) -> dict:
    """What ended in that time: requests by kind and result, and milliseconds that those that went well took."""
    chosen = [one for one in outcomes if since <= one.ended < until]
    results = {kind: dict(collections.Counter(one.result for one in chosen if one.kind == kind)) for kind in KINDS}
    times = sorted(one.ended - one.began for one in chosen if one.result == "ok")
    quantiles = {name: round(1000 * times[min(int(q * len(times)), len(times) - 1)]) for name, q in (
        ("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0))} if times else {}
    return {"seconds": round(until - since, 1), "requests": len(chosen), **results, **quantiles}


async def scenario(fleet: Fleet, load: Load, seconds: float, say: Callable[[str], None],
                   before_swap: Callable[[], None] = lambda: None, settle_s: float = swap.SETTLE_S) -> dict:
    """A quiet phase, a kill, a drain and a swap, under load throughout.

    Returns:
      for each phase its `summary`; for the kill also what nginx tried: `tries_of_the_dead`, seconds after it.
    """
    phases: dict[str, dict] = {}
    running = asyncio.create_task(load.run())

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[dict]:
        since, more = time.time(), {}
        yield more
        phases[name] = summary(load.outcomes, since, time.time()) | more
        say(f"{name}: {json.dumps(phases[name])}")

    try:
        await asyncio.sleep(1.0)
        with phase("quiet"):
            await asyncio.sleep(seconds)
        with phase("one killed") as found:
            killed = time.time()
            await asyncio.to_thread(fleet.kill, 1)
            await asyncio.sleep(seconds)
            found["tries_of_the_dead"] = [round(at - killed, 2) for at, _ in fleet.tries(1) if at > killed]
            found["last_failure_s"] = round(max((one.ended - killed for one in load.outcomes
                                                 if one.ended > killed and one.result != "ok"), default=0.0), 2)
            found["failed_that_began_after"] = sum(one.began > killed + 0.05 and one.result != "ok"
                                                   for one in load.outcomes)
        fleet.start(1)
        await asyncio.to_thread(fleet.wait_ready, 1)
        await asyncio.sleep(swap.SETTLE_S)  # nginx tries it again
        with phase("one drained") as found:
            began = time.time()
            found["exit_status"] = await asyncio.to_thread(fleet.drain, 2)
            found["drained_in_s"] = round(time.time() - began, 2)
            await asyncio.sleep(max(0.0, seconds - (time.time() - began)))
        fleet.start(2)
        await asyncio.to_thread(fleet.wait_ready, 2)
        await asyncio.sleep(swap.SETTLE_S)
        before_swap()
        with phase("all swapped"):
            await asyncio.to_thread(
                swap.swap, fleet.folder, fleet.restart, fleet.reload, ready="http://{address}/readyz",
                settle_s=settle_s, timeout_s=READY_S, say=say)
            await asyncio.sleep(1.0)
    finally:
        load.stop()
        await running
    return phases


def ask_each(fleet: Fleet, prompts: Sequence[str], max_tokens: int, n: int = 1) -> dict[str, set[str]]:
    """What instance n answers to each prompt, asked alone."""
    found = {}
    for prompt in prompts:
        answer = httpx.post(f"http://{fleet.http_address(n)}/v1/completions", timeout=60, json={
            "model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True})
        answer.raise_for_status()
        found[prompt] = {answer.json()["choices"][0]["text"]}
    return found


PROMPTS = ("def main(", "import os", "从前有一座山", "return ", "你好，世界", "class ")


def main() -> int:
    """Runs the scenario; a line for each phase, then one of JSON. Exit status 1 if more was lost than had to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=pathlib.Path, help="model; a tiny one of random weights by default")
    parser.add_argument("--next_run_dir", type=pathlib.Path, help="model that it is swapped for")
    parser.add_argument("--clients", type=int, default=18)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each phase but the swap")
    args = parser.parse_args()
    say = report.begin(("jax", "grpcio", "fastapi", "uvicorn"), 2)
    with tempfile.TemporaryDirectory(prefix="instances-") as name:
        folder = pathlib.Path(name)
        first = args.run_dir or make_run(folder / "runs" / "first", 0)
        following = args.next_run_dir or make_run(folder / "runs" / "next", 1)
        (folder / "fleet").mkdir()
        with Fleet(folder / "fleet", serve_command(first)) as fleet:
            answers = ask_each(fleet, PROMPTS, args.max_tokens)
            fleet.command = serve_command(following)
            fleet.restart(1)  # to know what the next model says, before anything is counted
            fleet.wait_ready(1)
            others = ask_each(fleet, PROMPTS, args.max_tokens)
            fleet.command = serve_command(first)
            fleet.restart(1)
            fleet.wait_ready(1)
            if answers == others:
                raise SystemExit("both models give the same answers: nothing would show that they were swapped")
            load = Load(fleet, answers, args.clients, args.max_tokens)

            def before_swap() -> None:
                fleet.command = serve_command(following)
                for prompt, texts in others.items():
                    answers[prompt] |= texts

            phases = asyncio.run(scenario(fleet, load, args.seconds, say, before_swap))
            swapped = [ask_each(fleet, PROMPTS, args.max_tokens, n) == others for n in fleet.numbers]
        print(json.dumps({"clients": args.clients, "max_tokens": args.max_tokens, "phases": phases,
                          "serves_the_next_model": all(swapped)}))
    lost = lost_needlessly(phases)
    for line in lost:
        print(f"LOST: {line}", file=sys.stderr)
    return 1 if lost or not all(swapped) else 0


def lost_needlessly(phases: Mapping[str, Mapping]) -> list[str]:
    """What should not have happened: anything but answers, save the streams that ran on the killed instance (cut, or
    before their first word told to try again), and gRPC's calls that reached the draining one, which nobody had taken
    out of the list (as `swap` does)."""
    found = []
    for name, phase in phases.items():
        for kind in KINDS:
            bad = {result: count for result, count in phase[kind].items() if result != "ok"}
            if name == "one killed":
                bad = {result: count for result, count in bad.items()
                       if not (kind.endswith("stream") and result.startswith("cut"))
                       and not (kind == "grpc stream" and result == "UNAVAILABLE")}
            if name == "one drained" and kind.startswith("grpc"):  # refused, or come when it was about to end
                bad = {result: count for result, count in bad.items() if result not in ("UNAVAILABLE", "CANCELLED")}
            if bad:
                found.append(f"{name}, {kind}: {bad}")
    if phases["one killed"]["failed_that_began_after"]:
        found.append(f"{phases['one killed']['failed_that_began_after']} requests failed that began after the kill")
    return found


if __name__ == "__main__":
    sys.exit(main())
