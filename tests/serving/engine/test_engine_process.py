"""The engine's process as the doors have it: what comes back, what stays behind, and what happens when either dies."""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import termios
import time

import pytest

import serving
from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint, PromptTooLong, SamplingParams, Unavailable
from serving.engine import wire
from serving.engine.child import EngineProcess
from serving.engine.front import InProcess, front_of
from serving.engine.process import Spec
from serving.mailbox import Mailbox
from tests.serving.doubles import CharacterTokenizer, FakeService, wait_until

ROOT = pathlib.Path(serving.__file__).parent.parent
FAKES = "tests.serving.engine.fakes"
PROMPT = [1, ord("你") + 3, ord("b") + 3]


def spec(make="make", **arguments):
    return Spec(f"{FAKES}:{make}", arguments)


def started(make="make", **arguments):
    return EngineProcess.start(spec(make, **arguments), CharacterTokenizer())


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def front(loop):
    """The front of an engine that all tests of the file may use; at the end it stops in order."""
    front = started(step_s=0.0005)
    loop.run(front.start())
    yield front
    front.close()
    assert front.process.wait() == 0


async def heard(front, prompt_ids, *params, **terms):
    """What the samples of a prompt came to, each joined."""
    box = Mailbox(asyncio.get_running_loop())
    await front.submit_samples(prompt_ids, params, [lambda d, i=i: box.push(i, d) for i in range(len(params))], **terms)
    return await gathered(box, len(params))


async def gathered(box, count):
    deltas = {}
    while sum(d[-1].finish_reason is not None for d in deltas.values()) < count:
        for i, delta in (await box.take()).items():
            deltas.setdefault(i, []).append(delta)
    return [dataclasses.replace(d[-1], text="".join(one.text for one in d),
                                token_ids=tuple(t for one in d for t in one.token_ids),
                                logprobs=tuple(p for one in d for p in one.logprobs),
                                top_logprobs=tuple(t for one in d for t in one.top_logprobs),
                                prompt_logprobs=tuple(t for one in d for t in one.prompt_logprobs))
            for _, d in sorted(deltas.items())]


async def quiet(front):
    """Whether nothing of what was asked runs on."""
    for _ in range(200):
        if (await front.stats())["running"] == 0:
            return True
        await asyncio.sleep(0.01)
    return False


def test_answers_are_those_of_a_service_in_this_process(loop, front):
    async def run(front):
        asked = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=7, logprobs=2, prompt_logprobs=1, sample=1)]
        answers = await heard(front, PROMPT, *asked, priority=3, tenant="租户", deadline_s=60)
        box = Mailbox(asyncio.get_running_loop())
        await front.embed(PROMPT, "last", lambda delta: box.push(0, delta))
        return answers, (await gathered(box, 1))[0].embedding.tolist()

    here = FakeService(step_s=0.0005)
    assert loop.run(run(front)) == loop.run(run(front_of(here)))
    here.close()
    assert (front.max_context, front.defaults, front.is_live) == (1_000_000, here.defaults, True)


def test_a_refusal_is_the_services_own_error(loop, front):
    async def run():
        with pytest.raises(PromptTooLong, match="has 1000001 tokens; at most 1000000 fit") as caught:
            await heard(front, [5] * 1_000_001, SamplingParams(max_tokens=1))
        assert caught.value.field == "prompt"
        with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
            await heard(front, PROMPT, SamplingParams(seed=666))
        assert not front._listeners and not front._answers
        return await heard(front, PROMPT, SamplingParams(max_tokens=2))

    assert loop.run(run())[0].text == "你b"  # the engine goes on


def test_huge_prompts_go_over_while_others_talk(loop, front):
    async def run():
        long = [300] * 900_000  # 2.7 MB each on the line
        many = asyncio.gather(*(heard(front, long, SamplingParams(max_tokens=2)) for _ in range(3)))
        await asyncio.sleep(0)
        assert len(front._unsent) > 4 << 20 and not front._flowing.is_set()  # it does not all fit
        short = await heard(front, PROMPT, SamplingParams(max_tokens=3))
        return await many, short

    many, short = loop.run(run())
    assert [answer.text for answer, in many] == [chr(297) * 2] * 3 and short[0].text == "你b你"
    assert not front._unsent and front._flowing.is_set()


def test_cancelled_requests_run_no_further(loop, front):
    async def run():
        box = Mailbox(asyncio.get_running_loop())
        first, second = [(await front.submit_samples(PROMPT, [SamplingParams(max_tokens=10**6)],
                                                     [lambda d, i=i: box.push(i, d)]))[0] for i in range(2)]
        await box.take()
        front.cancel(first)
        front.cancel(first)
        front.cancel(10**9)
        assert await wait(lambda stats: stats["running"] == 1)
        await box.take()
        assert set(await box.take()) == {1}  # nobody hears of the first any more, and the second goes on
        front.cancel(second)
        assert await wait(lambda stats: stats["running"] == 0)

    async def wait(condition):
        for _ in range(200):
            if condition(await front.stats()):
                return True
            await asyncio.sleep(0.01)
        return False

    loop.run(run())


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.45])
def test_a_cancelled_submit_leaves_nothing_behind(loop, front, seconds):
    """Whether the engine has begun to take it in or not, and with more of them than it takes in at once."""
    async def run():
        before = (await front.stats())["steps"]
        slow = SamplingParams(max_tokens=10**6, constraint=Constraint("regex", "a"))
        tasks = [asyncio.create_task(heard(front, PROMPT, slow)) for _ in range(5)]
        await asyncio.sleep(seconds)
        began = time.monotonic()
        assert (await heard(front, PROMPT, SamplingParams(max_tokens=1)))[0].text == "你"
        assert time.monotonic() - began < 0.3  # it waits for none of them
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        assert not front._listeners and not front._answers
        await asyncio.sleep(1.1)  # all that was begun has been taken in
        return before, await front.stats()

    before, stats = loop.run(run())
    assert stats["running"] == 0 and stats["steps"] - before <= 4  # those that waited for their turn never came


def waiting(line):
    """Bytes that could be read now."""
    held = array.array("i", [0])
    fcntl.ioctl(line, termios.FIONREAD, held)
    return held[0]


def test_doors_that_lag_get_fewer_larger_pieces():
    """As long as they don't read, what waits for them is merged; nothing is lost, and the engine waits for nobody."""
    process = EngineProcess(spec(step_s=0))
    try:
        assert process.ready() is not None
        both = [SamplingParams(max_tokens=20_000)] * 2
        process.line.sendall(wire.pack(("submit", [0, 1], PROMPT, both, 0, "", None)))
        process.line.settimeout(30)
        before = -1
        while (held := waiting(process.line)) != before:  # until the line holds no more
            before = held
            time.sleep(0.3)
        time.sleep(0.5)
        texts, largest, ended = {0: "", 1: ""}, 0, 0
        while ended < 2:
            kind, *values = wire.receive(process.line)
            for number, sent in values[0].items() if kind == "news" else ():
                delta = wire.full(sent)
                texts[number] += delta.text
                largest = max(largest, len(delta.token_ids))
                ended += delta.finish_reason is not None
        assert texts == dict.fromkeys((0, 1), "你b" * 10_000)
        assert largest > 20
    finally:
        process.kill()
        process.end()


def test_a_killed_engine_ends_its_calls_at_once(loop):
    async def run(front):
        await front.start()
        assert front.is_live and (await front.stats())["pid"] == front.process.pid
        running = [asyncio.create_task(heard(front, PROMPT, SamplingParams(max_tokens=10**6))) for _ in range(2)]
        slow = asyncio.create_task(heard(front, PROMPT, SamplingParams(constraint=Constraint("regex", "a"))))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        os.kill(front.process.pid, signal.SIGKILL)
        ends = [(await asyncio.wait_for(task, 10))[0] for task in running]
        with pytest.raises(Unavailable, match="the engine has ended"):
            await asyncio.wait_for(slow, 10)
        assert time.monotonic() - began < 1
        assert [(end.finish_reason, "the engine has ended" in end.error) for end in ends] == [("cancelled", True)] * 2
        assert not front.is_live
        for late in (front.stats(), heard(front, PROMPT, SamplingParams()), front.embed(PROMPT, "last", print)):
            with pytest.raises(Unavailable, match="the engine has ended"):
                await late
        front.cancel(0)
        front.begin_drain()
        return await front.lost()

    front = started()
    assert "killed by SIGKILL" in loop.run(run(front))
    front.close()
    front.close()


def test_an_engine_that_can_not_go_on_says_why(loop):
    async def run(front):
        await front.start()
        return await asyncio.wait_for(front.lost(), 10)

    front = started("ending")
    assert loop.run(run(front)) == "the device is lost"
    began = time.monotonic()
    front.close()
    assert time.monotonic() - began < 5
    assert front.process.wait() == 1


def test_draining_refuses_what_is_new_and_finishes_what_runs(loop):
    async def run(front):
        await front.start()
        running = asyncio.create_task(heard(front, PROMPT, SamplingParams(max_tokens=200)))
        await asyncio.sleep(0.05)
        front.begin_drain()
        assert not front.is_live
        with pytest.raises(Unavailable, match="shutting down"):
            await heard(front, PROMPT, SamplingParams())
        await asyncio.sleep(0.5)  # longer than the engine looks at its service
        return (await running)[0].text

    front = started()
    assert loop.run(run(front)) == "你b" * 100
    front.close()
    assert front.process.wait() == 0 and not front.failure


DOOR = """
import sys, time
from serving.engine.child import EngineProcess
from serving.engine.process import Spec
process = EngineProcess(Spec(sys.argv[1], {} if sys.argv[2] == "" else {"pid_file": sys.argv[2]}))
if not sys.argv[2]:
    process.ready()
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("is_loading", [False, True])
def test_an_engine_ends_with_its_doors(tmp_path, is_loading):
    pid_file = tmp_path / "pid"
    door = subprocess.Popen([sys.executable, "-c", DOOR, f"{FAKES}:{'endless' if is_loading else 'make'}",
                             str(pid_file) if is_loading else ""], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    lines = [door.stdout.readline()]
    if lines[0] == "making\n":
        lines.append(door.stdout.readline())
    pid = int(lines[-1])
    assert not is_loading or wait_until(pid_file.exists)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)  # as Ctrl-C does: the doors decide
    time.sleep(0.2)
    assert is_running(pid)
    door.kill()
    door.wait()
    door.stdout.close()  # which the engine has, too
    assert wait_until(lambda: not is_running(pid), 5)


def is_running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_can_not_be_served_is_said(capfd):
    with pytest.raises(UserError, match="^the run directory is damaged$"):
        started("damaged")
    with pytest.raises(UserError, match="ended with status 1 before it was ready"):
        started("broken")
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize(("failure", "status"), [("", 0), ("a process was lost", 1)])
def test_an_engine_that_follows_answers_nobody(failure, status):
    process = EngineProcess(spec("following", failure=failure))
    assert process.ready() is None
    assert process.end() == status


def test_a_front_is_used_after_its_start(loop):
    front = started()
    with pytest.raises(RuntimeError, match="start"):
        loop.run(front.stats())
    front.close()
    assert front.process.wait() == 0 and not front.is_live


def test_a_front_is_given_back_as_it_is(front):
    here = InProcess(FakeService())
    assert front_of(front) is front and front_of(here) is here
    assert isinstance(front_of(here.service), InProcess)
    here.close()


def test_the_doors_need_no_jax():
    """Its threads and its half gigabyte are the engine's."""
    code = ("import sys, serving.launch, serving.server, serving.engine.child, serving.engine.making, "
            "serving.http.app, serving.http.door; print([m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "[]\n"
