"""How long the next step may wait for what else arrives, told by a clock that the test moves."""

from __future__ import annotations

import pytest

from llm_jax.inference.pace import Pace


class Device:
    """Steps of one shape that take `seconds`, sent by a host that takes 1 ms."""

    def __init__(self):
        self.now, self.ends, self.idle = 0.0, 0.0, 0.0
        self.pace = Pace(lambda: self.now)

    def send(self, seconds):
        self.now += 0.001
        self.idle += max(0.0, self.now - self.ends)
        self.ends = max(self.now, self.ends) + seconds
        self.pace.sent(0.001)

    def turn(self, seconds, shape="a"):
        """As the service does while a step runs; returns how long was waited before the next was sent."""
        ends = self.ends
        held = self.pace.hold_s(shape)
        self.now += held
        is_late = self.now >= ends
        if is_late:
            self.pace.overslept(shape)
        self.send(seconds)
        self.now = max(self.now, ends)
        self.pace.landed(shape)
        return held


def test_the_next_step_is_sent_shortly_before_the_one_before_it_ends():
    device = Device()
    device.send(0.1)
    assert device.turn(0.1) == 0.0, "nothing is known yet"
    for _ in range(20):
        held = device.turn(0.1)
    assert held == pytest.approx(0.85 * 0.1 - 0.002, abs=0.002)
    assert device.idle == pytest.approx(0.001), "only before the first"


def test_steps_that_become_shorter_leave_the_device_idle_once_or_twice_and_no_more():
    device = Device()
    device.send(0.1)
    for _ in range(20):
        device.turn(0.1)
    idle = device.idle
    for _ in range(3):
        device.turn(0.02)
    assert device.idle > idle, "it was late, or there is nothing to see here"
    for _ in range(20):
        device.turn(0.02)
    late = device.idle
    for _ in range(20):
        assert device.turn(0.02) <= 0.02
    assert device.idle == late


def test_a_shape_that_is_new_and_a_step_shorter_than_its_preparation_wait_for_nothing():
    device = Device()
    device.send(0.1)
    for _ in range(4):
        device.turn(0.1)
    assert device.pace.hold_s("b") == 0.0
    device = Device()
    device.send(0.002)
    assert [device.turn(0.002) for _ in range(10)] == [0.0] * 10


def test_nothing_is_waited_for_when_nothing_runs():
    device = Device()
    device.send(0.1)
    for _ in range(4):
        device.turn(0.1)
    device.pace.landed("a")
    assert device.pace.hold_s("a") == 0.0
