"""Where the time goes, told by clocks that the test turns."""

from __future__ import annotations

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.training.goodput import CATEGORIES, Goodput, shares


class Clock:
    """A time that stands still until it is told to pass."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Outputs:
    """Stands for the arrays of a step that is under way until `finish`."""

    def __init__(self):
        self._done = threading.Event()

    def block_until_ready(self):
        self._done.wait(10)
        return self

    def finish(self, goodput: Goodput):
        self._done.set()
        while goodput._device.idle_since() is None:
            time.sleep(1e-3)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def goodput(clock):
    made = Goodput(clock)
    yield made
    made.close()


def test_every_second_belongs_somewhere(goodput, clock):
    clock.now += 2  # other
    goodput.enter("step")
    clock.now += 5
    with goodput.spend("evaluation"):
        clock.now += 3
        with goodput.spend("checkpoint"):
            clock.now += 1
        clock.now += 1
    clock.now += 4
    found = goodput.seconds()
    assert found == {"step": 9, "compile": 0, "data": 0, "checkpoint": 1, "evaluation": 4, "lost": 0, "other": 2}
    np.testing.assert_allclose(sum(shares(found).values()), 1)
    assert shares(dict.fromkeys(CATEGORIES, 0.0))["step"] == 0


def test_waiting_for_data_counts_from_when_the_device_has_nothing_to_do(goodput, clock):
    goodput.enter("step")
    step = Outputs()
    goodput.sent(step)
    with goodput.waiting_for_data():
        clock.now += 3  # the device is busy
        step.finish(goodput)
        clock.now += 2  # and now it isn't
    assert (goodput.seconds()["step"], goodput.seconds()["data"]) == (3, 2)
    slow = Outputs()
    goodput.sent(slow)
    with goodput.waiting_for_data():
        clock.now += 7  # all of it hidden behind the step
    slow.finish(goodput)
    with goodput.waiting_for_data():
        clock.now += 1  # all of it in vain
    assert (goodput.seconds()["step"], goodput.seconds()["data"]) == (10, 3)


def test_what_fails_on_the_device_ends_no_thread(goodput, clock):
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("the device is gone")

    goodput.sent(Broken())
    good = Outputs()
    goodput.sent(good)
    good.finish(goodput)


def test_compiling_is_taken_out_of_whatever_waits_for_it():
    clock = Goodput()
    clock.enter("evaluation")
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 17.25)(np.ones((3, 3), np.float32)).block_until_ready()
    found = clock.seconds()
    assert found["compile"] > 0 and clock.compiles >= 1
    assert found["compile"] + found["evaluation"] == pytest.approx(sum(found.values()) - found["other"])
    before = clock.compiles
    thread = threading.Thread(target=lambda: jax.jit(lambda x: x * 3.125 - 1)(np.ones(5)).block_until_ready())
    thread.start()
    thread.join()
    assert clock.compiles == before  # nobody here waited for that one
    clock.close()
    jax.jit(lambda x: x * 5.375 - 1)(np.ones(5)).block_until_ready()
    assert clock.compiles == before


def test_a_trace_within_a_trace_is_counted_once(goodput, clock):
    trace, backend = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"
    goodput.enter("step")
    clock.now += 3
    goodput._on_compile(trace, 2.0)  # the inner one, from 101 to 103
    clock.now += 1
    goodput._on_compile(trace, 4.0)  # the outer one, from 100 to 104
    clock.now += 5
    goodput._on_compile(backend, 5.0)
    assert goodput.seconds()["compile"] == 9 and goodput.seconds()["step"] == 0 and goodput.compiles == 1


def test_a_process_goes_on_with_the_time_of_the_one_before(goodput, clock):
    clock.now += 1
    saved = {"step": 50.0, "compile": 5.0, "other": 5.0}
    last = {"step": 70.0, "compile": 5.0, "checkpoint": 2.0, "other": 6.0}  # 20 s of steps after the checkpoint
    goodput.carry_on(saved, last)
    assert goodput.seconds() == {"step": 50, "compile": 5, "data": 0, "checkpoint": 2, "evaluation": 0, "lost": 20,
                                 "other": 7}
    fresh = Goodput(clock)
    fresh.carry_on(saved, {"step": 40.0})  # the report is older than the checkpoint
    assert fresh.seconds()["step"] == 50 and fresh.seconds()["lost"] == 0
    fresh.close()


def test_a_rollback_loses_the_steps_since_the_checkpoint(goodput, clock):
    goodput.carry_on({})
    goodput.enter("step")
    clock.now += 10
    saved = goodput.seconds()
    clock.now += 4
    goodput.carry_on(saved)
    assert (goodput.seconds()["step"], goodput.seconds()["lost"]) == (10, 4)
