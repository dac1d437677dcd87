"""The engine's process as the process that started it sees it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import serving
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from serving.engine import wire
from serving.engine.process import Facts, Spec
from serving.engine.remote import RemoteFront
from serving.loading import SIGNALS

CLOSE_S = 75.0  # a step may be under way; of several processes, JAX waits a minute for the others
REAP_S = 2.0  # from the end of its line to that of the process


class EngineProcess:
    """A process of its own for the engine, which ends with this one.

    Attributes:
      line: the socket to it.
    """

    def __init__(self, spec: Spec) -> None:
        """Starts the process, which begins to load; its output goes where this process's goes."""
        self.line, theirs = socket.socketpair()
        root = str(pathlib.Path(serving.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # A signal to the process group, such as Ctrl-C's, is for the doors alone, which say what follows from it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving.engine", str(theirs.fileno())], stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
        with contextlib.suppress(OSError):  # if it has ended already, `ready` says so
            self.line.sendall(wire.pack(("start", spec)))

    @classmethod
    def start(cls, spec: Spec, tokenizer: Any = None) -> RemoteFront:
        """Starts an engine and waits until it answers, which may take minutes.

        Args:
          spec: which.
          tokenizer: the model's; None loads it from the folder that the engine names.
        Raises:
          UserError: it can't be served, or the process ended.
        """
        process = cls(spec)
        try:
            facts = process.ready()
            if facts is None:
                raise UserError("this process takes part in another's steps and answers nobody")
            return process.front(facts, tokenizer)
        except BaseException:
            process.kill()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ready(self) -> Facts | None:
        """Waits until the engine answers; None if it only takes part in another process's steps.

        Raises:
          UserError: it can't be served, or the process ended.
        """
        message = wire.receive(self.line)
        if message is None:
            raise UserError(f"{self.how_it_ended()} before it was ready")
        kind, *values = message
        if kind == "failed":
            self.wait(CLOSE_S)
            raise UserError(*values)
        return values[0] if kind == "ready" else None

    def front(self, facts: Facts, tokenizer: Any = None) -> RemoteFront:
        """The front of an engine that is ready; arguments as of `start`."""
        return RemoteFront(self, facts, Tokenizer.load(facts.source) if tokenizer is None else tokenizer)

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the process to end, and kills it if it has not in time; its exit status, -9 if it was killed."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def end(self) -> int:
        """Waits for a process that was told to end; its exit status."""
        status = self.wait(CLOSE_S)
        self.line.close()
        return status

    def kill(self) -> None:
        """Ends the process at once; any thread."""
        self._process.kill()

    def how_it_ended(self) -> str:
        """A clause that says what became of the process, whose line has ended."""
        status = self.wait(REAP_S)
        if status >= 0:
            return f"the engine's process ended with status {status}"
        reason = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        return f"the engine's process was killed by {signal.Signals(-status).name}{reason}"
