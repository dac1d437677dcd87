"""A server under mixed traffic for a long time: nothing may leak, stall, or be answered wrongly.

    python -m benchmarks.soak --minutes=20                       # a tiny model of random weights
    python -m benchmarks.soak --minutes=60 --run_dir=runs/quickstart --clients=24

Of the requests 20 % are cancelled, 5 % malformed, 2 % oversized, 4 % read slowly, 2 % not read until every buffer on
the way is full, and 5 % drop their connection in the middle; 1 % are batches. The others come by HTTP (texts, chats,
calls of tools, responses, embeddings, files), WebSocket and both services of gRPC, sessions included. Each answer is
compared with what the model said when it was asked alone, and each request has one line in the audit file. Pages,
memory, threads and file descriptors of both processes are read every few seconds; what they come back to when the
traffic has ended is held against what they were after the first minute of it.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import report
from benchmarks.fleet import ROOT, free_ports, make_run, serve_command
from benchmarks.soak_traffic import Asker, Known, choose, learn
from benchmarks.soak_traffic.asker import STALL_S, Doors, Wrong
from benchmarks.soak_traffic.batches import BATCH_S

PROMPTS = tuple(f"{kind} {i}" for kind in ("def main(", "从前有一座山", "import os", "你好，世界") for i in range(10))
QUIET_S = 30.0  # at most, until the server has let go of what the last clients left
MEMORY_MIB = 24.0  # growth of a process that is within what allocators and caches do
LIMIT_S = {"batch": BATCH_S}  # for an answer; of other kinds STALL_S
FILES, THREADS = 4, 4  # likewise, of descriptors (connections that are about to close) and threads (pools that grow)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the server holds at one time; of two processes: the door's, then the engine's."""

    seconds: float
    pages: int
    running: int
    open_requests: int
    memory_mib: tuple[float, ...]
    threads: tuple[int, ...]
    files: tuple[int, ...]


class Watch:
    """Looks at a server from outside: its processes, and what it says of itself."""

    def __init__(self, pid: int, url: str, key: str) -> None:
        door = psutil.Process(pid)
        self._processes = [door, *door.children()]
        self._url, self._headers = f"{url}/metrics", {"authorization": f"Bearer {key}"}
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    async def look(self, client: httpx.AsyncClient) -> Sample:
        """Takes a sample."""
        values: collections.Counter[str] = collections.Counter()
        answer = await client.get(self._url, headers=self._headers)
        for family in text_string_to_metric_families(answer.text):
            for one in family.samples:
                values[one.name] += one.value
        sample = Sample(
            round(time.monotonic() - self._began, 1), int(values["llm_jax_kv_cache_pages_used"]),
            int(values["llm_jax_num_requests_running"] + values["llm_jax_num_requests_waiting"]),
            int(values["llm_jax_requests_in_progress"]) - 1,  # this one
            tuple(round(p.memory_info().rss / 2**20, 1) for p in self._processes),
            tuple(p.num_threads() for p in self._processes), tuple(p.num_fds() for p in self._processes))
        self.samples.append(sample)
        return sample


@dataclasses.dataclass
class Result:
    """What came of the traffic: times by kind, and how often each action was done, by its name."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    actions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    wrong: list[str] = dataclasses.field(default_factory=list)


async def soak(http_port: int, grpc_port: int, pid: int, key: str, *, seconds: float, warm_s: float, clients: int,
               prompts: tuple[str, ...], say: Callable[[str], None]) -> tuple[Result, Sample, Sample, Watch, Known]:
    """Runs the traffic.

    Args:
      http_port, grpc_port, pid: of the server.
      key: a developer's.
      seconds: of traffic, with which it is judged.
      warm_s: of traffic before the first quiet sample: pools and caches fill.
      clients: at once.
      prompts: those whose answer could depend on rounding are left out.
      say: receives a line every half minute.

    Returns:
      what came of it; what the server held when it was quiet, before and afterwards; all samples; and what must stand
      in the audit file.
    """
    known, result = Known(), Result()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with (httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", timeout=STALL_S, limits=limits,
                                  headers={"authorization": f"Bearer {key}"}) as client,
                grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel):
        watch = Watch(pid, f"http://127.0.0.1:{http_port}", key)
        doors = Doors(http_port, grpc_port, key, client, channel)
        traffic = [Asker(doors, known, seed) for seed in range(clients)]
        model = (await client.get("/v1/models")).json()["data"][0]
        known.talks = model["has_chat_template"]
        for prompt in prompts:
            await learn(traffic[0], prompt)
        if len(known.embeddings) < 2 or (known.talks and not (known.follow_ups and known.calls)):
            raise SystemExit("the model's likeliest tokens are too near to each other to check its answers")
        say(f"of {len(prompts)} prompts {len(known.embeddings)} have one answer as a text, "
            f"{len(known.follow_ups)} in a conversation, {len(known.calls)} with a tool")

        async def go_on(one: Asker, until: float, into: Result) -> None:
            while time.monotonic() < until:
                kind, action = choose(one)
                began = time.monotonic()
                try:
                    await asyncio.wait_for(action(one), 2 * LIMIT_S.get(kind, STALL_S))
                except Wrong as error:
                    into.wrong.append(f"{action.__name__}: {error}")
                    say(f"WRONG: {into.wrong[-1]}")
                except Exception as error:  # noqa: BLE001 - whatever else a client sees is wrong, too
                    into.wrong.append(f"{action.__name__}: {error!r:.300}")
                    say(f"WRONG: {into.wrong[-1]}\n{traceback.format_exc()}")
                into.counts[kind] += 1
                into.actions[action.__name__] += 1
                into.seconds[kind].append(time.monotonic() - began)

        async def run(duration: float, into: Result) -> None:
            until = time.monotonic() + duration
            tasks = [asyncio.create_task(go_on(one, until, into)) for one in traffic]
            told = 0.0
            while not all(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=5.0)
                sample = await watch.look(client)
                if sample.seconds - told >= 30:
                    told = sample.seconds
                    say(f"{dict(into.counts)}; {len(into.wrong)} wrong; {sample}")
            await asyncio.gather(*tasks)

        await run(warm_s, result)
        before = await _quiet(watch, client)
        say(f"after {warm_s:g} s of warming up, quiet: {before}")
        await run(seconds, result)
        after = await _quiet(watch, client)
        say(f"after {seconds:g} s, quiet: {after}")
    return result, before, after, watch, known


async def _quiet(watch: Watch, client: httpx.AsyncClient) -> Sample:
    """What the server holds when nobody asks for anything any more; the last look, if it does not get quiet."""
    until = time.monotonic() + QUIET_S
    await asyncio.sleep(2.0)
    while True:
        sample = await watch.look(client)
        if not (sample.pages or sample.running or sample.open_requests) or time.monotonic() > until:
            await asyncio.sleep(1.0)
            return await watch.look(client)
        await asyncio.sleep(0.5)


def judge(result: Result, before: Sample, after: Sample) -> list[str]:
    """What is wrong with it; empty if nothing."""
    found = [f"{len(result.wrong)} answers were wrong, the first: {result.wrong[0]}"] if result.wrong else []
    for name in ("pages", "running", "open_requests"):
        if getattr(after, name):
            found.append(f"{getattr(after, name)} {name} are left")
    for which, process in enumerate(("door", "engine")[:len(after.files)]):
        for name, most in (("memory_mib", MEMORY_MIB), ("files", FILES), ("threads", THREADS)):
            grown = getattr(after, name)[which] - getattr(before, name)[which]
            if grown > most:
                found.append(f"the {process}'s {name} have grown by {grown:.1f}")
    for kind, times in result.seconds.items():
        if max(times) > LIMIT_S.get(kind, STALL_S):
            found.append(f"a request ({kind}) took {max(times):.1f} s")
    return found


def figures(result: Result, before: Sample, after: Sample, watch: Watch, known: Known, seconds: float) -> dict:
    """The outcome as plain values."""
    late = [one for one in watch.samples if one.seconds > watch.samples[-1].seconds / 2]
    times = {kind: {"count": result.counts[kind], "p50_s": round(statistics.median(found), 3),
                    "p99_s": round(sorted(found)[int(0.99 * len(found))], 3), "max_s": round(max(found), 3)}
             for kind, found in sorted(result.seconds.items())}
    growth = [round(statistics.linear_regression([one.seconds / 3600 for one in late],
                                                 [one.memory_mib[i] for one in late]).slope, 1)
              for i in range(len(after.memory_mib))] if len(late) > 2 else None
    tokens, merged, most = known.merged
    return {"seconds": seconds, "requests": result.counts.total(), "wrong": result.wrong[:20], "kinds": times,
            "actions": dict(sorted(result.actions.items())),
            "to_stalled_readers": {"tokens": tokens, "merged": merged, "most_in_a_piece": most},
            "before": dataclasses.asdict(before), "after": dataclasses.asdict(after),
            "most_pages": max(one.pages for one in watch.samples),
            "mib_per_hour_in_the_second_half": growth}


@contextlib.contextmanager
def running_server(folder: pathlib.Path, run_dir: pathlib.Path) -> Iterator[tuple[int, int, int, str]]:
    """`experiments.serve` with keys and a small response cache: HTTP port, gRPC port, process id and a key."""
    keys_file = folder / "keys.json"
    made = subprocess.run([sys.executable, "-m", "experiments.keys", "create", f"--keys_file={keys_file}",
                           "--name=soak", "--role=developer", "--json"], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE)
    key = json.loads(made.stdout)["key"]
    http_port, grpc_port = free_ports(2)
    command = [*serve_command(run_dir)(1, grpc_port, http_port), f"--keys_file={keys_file}",
               f"--audit_file={folder / 'audit.jsonl'}", f"--state_dir={folder / 'state'}", "--max_queue=512"]
    command = [*(flag for flag in command if "response_cache" not in flag), "--response_cache_entries=8"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 180
            while "ready: " not in (folder / "server.log").read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start:\n{(folder / 'server.log').read_text()}")
                time.sleep(0.1)
            yield http_port, grpc_port, process.pid, key
        finally:
            process.send_signal(signal.SIGTERM)
            (folder / "status").write_text(str(process.wait(60)))


def said(folder: pathlib.Path, key: str, known: Known) -> list[str]:
    """What is wrong with how the server ended and with what it has written."""
    log, audit = (folder / "server.log").read_text(), (folder / "audit.jsonl").read_text()
    found = [f"the server's status was {status}"] if (status := (folder / "status").read_text()) != "0" else []
    if "Traceback" in log:
        found.append(f"the server said:\n{log[log.index('Traceback') - 500:][:4000]}")
    found += [f"the key stands in the {name}" for name, text in (("log", log), ("audit file", audit)) if key in text]
    return found + unaudited([json.loads(line) for line in audit.splitlines()], known)


def unaudited(lines: Sequence[Mapping[str, Any]], known: Known) -> list[str]:
    """What the audit file does not say exactly once, or says otherwise than the clients saw it."""
    statuses: dict[str, list[str]] = collections.defaultdict(list)
    for line in lines:
        statuses[line["request_id"]].append(line["status"])
    wrong = {name: statuses[name] for name, may in known.sent.items()
             if len(statuses[name]) != 1 or statuses[name][0] not in may}
    found = [f"of {len(known.sent)} requests {len(wrong)} have other audit lines than one that fits, such as "
             f"{dict(list(wrong.items())[:5])}"] if wrong else []
    keyless = sum(line["status"] == "unauthenticated" for line in lines)
    return found + ([f"{keyless} requests came without their key"] if keyless else [])


def main() -> int:
    """Soaks, prints lines of progress and one of JSON; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--warm_seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--run_dir", type=pathlib.Path, help="model; a tiny one of random weights by default")
    args = parser.parse_args()
    say = report.begin(("jax", "grpcio", "fastapi", "uvicorn"), 2)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = pathlib.Path(name)
        run_dir = args.run_dir or make_run(folder / "runs" / "tiny", 0)
        with running_server(folder, run_dir) as (http_port, grpc_port, pid, key):
            outcome = asyncio.run(soak(http_port, grpc_port, pid, key, seconds=60 * args.minutes,
                                       warm_s=args.warm_seconds, clients=args.clients, prompts=PROMPTS, say=say))
        problems = said(folder, key, outcome[-1])
        lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    result, before, after, watch, known = outcome
    problems += judge(result, before, after)
    print(json.dumps(figures(result, before, after, watch, known, 60 * args.minutes) | {
        "audit_lines": dict(collections.Counter(line["status"] for line in lines)),
        "checked_audit_lines": len(known.sent), "problems": problems}))
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
