"""Services for an engine's process that need no model."""

from __future__ import annotations

import atexit
import os
import threading
import time

from llm_jax.errors import UserError
from serving.engine.process import Made
from tests.serving.doubles import FakeService


class Slow(FakeService):
    """Takes half a second over a request with a constraint, and any length of prompt."""

    max_context = max_prompt_tokens = 1_000_000

    def submit_samples(self, prompt_ids, params, *args, **terms):
        if params[0].constraint is not None:
            time.sleep(0.5)
        if params[0].seed == 666:
            raise ZeroDivisionError("a bug")
        return super().submit_samples(prompt_ids, params, *args, **terms)


class Following(FakeService):
    """Takes part in another's steps, which soon end."""

    def __init__(self, failure: str) -> None:
        super().__init__()
        self.failure = failure

    def join(self) -> None:
        time.sleep(0.05)


def make(say, **options) -> Made:
    """A service that answers at once."""
    say("making")
    return Made(Slow(**options), "here")


def ending(say) -> Made:
    """One that ends by itself, as after a lost device, in a process that would take long to end."""
    atexit.register(time.sleep, 60)
    service = Slow()
    service.failure = "the device is lost"
    threading.Timer(0.3, service.begin_drain).start()
    return Made(service)


def following(say, failure: str) -> Made:
    """One of several processes, not the first."""
    return Made(Following(failure), follows=True)


def endless(say, pid_file: str) -> None:
    """Never ready."""
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def damaged(say) -> None:
    """What the user has to know."""
    raise UserError("the run directory is damaged")


def broken(say) -> None:
    """What the user can't do anything about."""
    raise ZeroDivisionError
