"""Contenders live in processes of their own: commands go in as lines of JSON, answers come out the same way."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Worker:
    """A process that runs a module of this package and answers.

    Args:
      module: its name; it calls `answer`, or prints a line of its own when it is ready.
      arguments: of its command line.
      log: the file that takes what it says beside its answers.
      ready: how the line begins that says that it is ready.
    """

    def __init__(self, module: str, arguments: list[str], log: pathlib.Path, ready: str = "ready"):
        self._module, self._log = module, log
        with open(log, "w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr, text=True, cwd=ROOT, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
        self.ready_line = self._line(ready)

    def ask(self, command: str, **values: Any) -> Any:
        """Sends a command and waits for its answer.

        Raises:
          SystemExit: the process failed.
        """
        try:
            self._process.stdin.write(json.dumps({"command": command, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        return json.loads(self._line("{"))["answer"]

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _line(self, beginning: str) -> str:
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line.strip()
        raise self._failed()

    def _failed(self) -> SystemExit:
        self._process.wait()
        tail = "".join(self._log.read_text(errors="replace").splitlines(keepends=True)[-15:])
        return SystemExit(f"{self._module} ended with status {self._process.returncode}:\n{tail}")


def answer(commands: Mapping[str, Callable[..., Any]]) -> None:
    """The worker's side: says that it is ready, then answers commands until its input ends.

    What libraries print goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        values = json.loads(line)
        print(json.dumps({"answer": commands[values.pop("command")](**values)}), file=out, flush=True)
