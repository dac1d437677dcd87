"""Ends a run that stands still, so that what launched it can start it again from its last checkpoint.

A thread in each process looks at when its own loop last got on, and with several processes at when each was last heard
of. What is noticed:

  this process     no progress for `timeout_s`: a data loader, a disk or a device that hangs
  a lost process   killed, stopped, or cut off: not heard of for `peer_timeout_s`
  a failed one     it ended with an error, and the others would wait for it in the next collective

The process then says so in one line, leaves the stacks of its threads in `logs/`, saves if it can, and ends with status
`STATUS`. What it can save: a checkpoint that is being written is completed as long as every process that writes it
lives; a state that no step has taken yet (one process that waits for its data) is saved. A step that hangs on a device
or in a collective can't be: the memory of the state before it was handed to it.

Processes hear of each other through the key-value store of JAX's own coordination service. Each puts down its beat, the
lead reads all of them and puts down a verdict, the others read that: traffic grows with the number of processes.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
from etils import epath

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.parallel import distributed
from llm_jax.training.lock import RunLock

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
_STATUS_OF_USER_ERRORS = 2  # as `experiments.cli.run` gives them
_BEATS, _VERDICTS = "llm_jax/beats", "llm_jax/verdicts"
_DONE = "done"


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """How long a run may stand still.

    Attributes:
      timeout_s: seconds a process may go without progress (a step, a batch, a save, a batch of an evaluation) before it
        ends itself with status 75; 0 for as long as it likes.
      startup_s: the same for whatever a process does for the first time, which may have to be compiled.
      peer_timeout_s: seconds after which a process that the others have not heard of counts as lost.
      save_s: seconds that saving may take on the way out.
    """

    timeout_s: float = 0.0
    startup_s: float = 3600.0
    peer_timeout_s: float = 60.0
    save_s: float = 60.0

    @property
    def runtime_timeout_s(self) -> float:
        """After which JAX's own runtime may abort all over a lost process: when the watch has said more, and saved."""
        return 3 * self.peer_timeout_s + self.save_s

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_0 = field.name in ("timeout_s", "save_s")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not (value > 0 or value == 0 and may_be_0):
                least = "at least" if may_be_0 else "more than"
                raise UserError(f"WatchConfig.{field.name} must be {least} 0 seconds, not {value!r}")


class Watch:
    """Watches this process, and its peers if it has any, from `with` on."""

    def __init__(self, config: WatchConfig, run_dir: epath.PathLike, logs: str):
        """Does nothing yet.

        Args:
          config: how long is too long.
          run_dir: the run directory.
          logs: the folder in it for the stacks of a process that hangs.
        """
        self._config, self._run_dir, self._logs = config, storage.located(run_dir), logs
        self.lock: RunLock | None = None  # of the run directory, on the process that holds it
        self.save: Callable[[], str | None] | None = None  # saves what can be, and says what it did; on any thread
        self._index, self._count = jax.process_index(), jax.process_count()
        limits = [x for x in (config.timeout_s, config.peer_timeout_s if self._count > 1 else 0) if x]
        self._period = max(min([*limits, 20.0]) / 10, 0.05)
        self._seen: set[str] = set()
        self._doing, self._since, self._limit = "starting", time.monotonic(), config.startup_s
        self._verdict: tuple[int, str] | None = None
        self._failed: tuple[float, BaseException] | None = None
        self._heard = time.monotonic()  # when the coordination service last answered
        self._closed, self._ending = threading.Event(), threading.Event()

    def __enter__(self) -> Watch:
        targets = [self._look] if self._config.timeout_s or self._count > 1 else []
        targets += [self._exchange] if self._count > 1 else []
        self._since = self._heard = time.monotonic()
        for target in targets:
            threading.Thread(target=target, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.failed(error)
        self._rest_if_ending()
        if self._count > 1:
            self._tell(beat=_DONE)
        self._closed.set()

    def failed(self, error: BaseException) -> None:
        """Tells the other processes of an error, before what is open is closed: closing may have to wait for them.

        Only the first error counts; a process that was asked to stop (`SystemExit`) has not failed.
        """
        self._rest_if_ending()
        if self._count == 1 or self._failed is not None or isinstance(error, SystemExit):
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A collective, most likely: the cause is another process, and will be known soon.
            time.sleep(self._config.peer_timeout_s + 4 * self._period)
            self._rest_if_ending()
        self._failed = time.monotonic(), error
        lines = str(error).strip().splitlines() or [""]
        status = _STATUS_OF_USER_ERRORS if isinstance(error, UserError) else STATUS
        self._tell((status, f"process {self._index} failed: {type(error).__name__}: {lines[0][:1000]}"))

    def at(self, step: int, doing: str) -> None:
        """Notes that the loop got on: it is at `step`, and `doing` this now. A UserError if the run was taken over."""
        if self.lock is not None:
            self.lock.check()
        self._limit = self._config.timeout_s if doing in self._seen else self._config.startup_s
        self._seen.add(doing)
        self._doing, self._since = f"step {step} ({doing})", time.monotonic()
        self._rest_if_ending()

    def during(self, step: int, doing: str, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, each of which is progress."""
        for item in items:
            self.at(step, doing)
            yield item

    def _rest_if_ending(self) -> None:
        """Stops this thread for good if the process is about to end, so that one message is the last."""
        if self._ending.is_set():
            threading.Event().wait()

    def _look(self) -> None:
        while not self._closed.wait(self._period):
            now = time.monotonic()
            if self._failed is not None:
                if now - self._failed[0] > self._config.save_s:
                    self._end_failed(self._failed[1])
                continue
            if self._verdict is not None:
                self._end(self._verdict[1], self._verdict[0])
            stood = now - self._since
            if self._config.timeout_s and stood > max(self._limit, self._config.timeout_s):
                self._end(f"no progress for {stood:.0f} s at {self._doing}", is_own=True)
            if self._count > 1 and now - self._heard > self._config.peer_timeout_s:
                self._end(f"process 0, by which the others find each other, has not answered for "
                          f"{now - self._heard:.0f} s: killed, stopped or cut off; this one was at {self._doing}")

    def _exchange(self) -> None:
        """Beats, and looks for verdicts; the lead looks at the beats and gives them."""
        last: dict[int, tuple[str, float]] = {index: ("", time.monotonic()) for index in range(self._count)}
        number = 0
        while not self._closed.wait(self._period):
            number += 1
            try:
                store = distributed.key_values()
                beat = {"number": number, "host": socket.gethostname(), "doing": self._doing}
                store.set(f"{_BEATS}/{self._index}", json.dumps(beat))
                if self._index == 0 and (found := _lost(store.all(_BEATS), last, self._config.peer_timeout_s)):
                    store.set(f"{_VERDICTS}/{self._index}", json.dumps((STATUS, found)))
                verdicts = store.all(_VERDICTS)
                self._heard = time.monotonic()
            except Exception:  # noqa: BLE001,S112 the service is gone or busy: `_look` sees for how long
                continue
            if verdicts and self._verdict is None:
                self._verdict = json.loads(next(iter(verdicts.values())))

    def _tell(self, verdict: tuple[int, str] | None = None, beat: str | None = None) -> None:
        """Puts something down for the others; gives up if nobody answers."""
        def put() -> None:
            try:
                store = distributed.key_values()
                if verdict is not None:
                    store.set(f"{_VERDICTS}/{self._index}", json.dumps(verdict))
                if beat is not None:
                    store.set(f"{_BEATS}/{self._index}", beat)
            except Exception:  # noqa: BLE001 there is nobody to tell
                pass

        telling = threading.Thread(target=put, name="watch", daemon=True)
        telling.start()
        telling.join(max(1.0, 2 * self._period))

    def _end(self, problem: str, status: int = STATUS, is_own: bool = False) -> None:
        self._ending.set()
        if is_own and self._count > 1:
            self._tell((STATUS, f"process {self._index} made {problem}"))
        stacks = self._leave_stacks()
        saved: list[str | None] = []
        if self.save is not None and status == STATUS:
            save = self.save
            saving = threading.Thread(target=lambda: saved.append(save()), name="last save", daemon=True)
            saving.start()
            saving.join(self._config.save_s)
        did = saved[0] if saved and saved[0] else "nothing could be saved beyond the last checkpoint"
        if self.lock is not None:
            self.lock.release()
        who = f"process {self._index} of {self._count}: " if self._count > 1 else ""
        then = f"; status {STATUS}, the same command goes on from there" if status == STATUS else ""
        self._leave(f"error: {who}{problem}. Stacks are in {stacks}; {did}{then}", status)

    def _end_failed(self, error: BaseException) -> None:
        """Ends a process that failed and then hangs while it closes what it had open."""
        self._ending.set()
        if isinstance(error, UserError):
            self._leave(f"error: {error}", _STATUS_OF_USER_ERRORS)
        self._leave("".join(traceback.format_exception(error)).rstrip(), 1)

    def _leave(self, message: str, status: int) -> NoReturn:
        print(message, file=sys.stderr, flush=True)
        if self._count > 1 and self._index == 0:
            time.sleep(4 * self._period)  # by this one the others hear why
        os._exit(status)

    def _leave_stacks(self) -> str:
        path = self._run_dir / self._logs / f"stacks-{self._index}.txt"
        try:
            with tempfile.TemporaryFile() as file:  # it needs a real one
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                storage.write_atomically(path, file.read())
        except OSError as error:
            return f"no file ({error})"
        return str(path)


def _lost(beats: dict[str, str], last: dict[int, tuple[str, float]], timeout_s: float) -> str | None:
    """Which process has not been heard of for `timeout_s`; keeps in `last` what each said and when it was new."""
    now = time.monotonic()
    for index, (before, when) in last.items():
        said = beats.get(str(index), "")
        if said != before:
            last[index] = (said, now)
        elif said != _DONE and now - when > timeout_s:
            where = "it never said anything"
            if said:
                beat: dict[str, Any] = json.loads(said)
                where = f"on {beat['host']}, last at {beat['doing']}"
            return f"process {index} was not heard of for {now - when:.0f} s ({where}): killed, stopped or cut off"
    return None
