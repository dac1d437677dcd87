"""The log of what was asked and answered: off unless it is asked for, and then with personal data masked."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import logging.handlers
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.inference.request import Delta, SamplingParams
from serving import pii
from serving.access.identity import Caller, Identity
from serving.admission import Admission
from serving.logs import without_keys

MAX_WAITING = 256  # interactions that are not written yet: masking a long text takes a while, and nobody waits for it
MAX_CHARACTERS = 50_000  # of a text; of what is longer only the beginning is in the log
_MAX_PIECE = 256  # of personal data: none is cut in two
CLOSE_S = 10.0
_COMPLAIN_S = 60.0
_DEFAULTS = SamplingParams()

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Interaction:
    ended: float
    caller: Caller
    identity: Identity
    tenant: str
    prompt_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str]
    sampling: SamplingParams
    answer: Sequence[Delta]


class Interactions:
    """Writes a JSON line for each generation to a file that only its owner may read; a thread of its own does it.

    A line has what was sent (before any filter changed it) and what was told, both as text with personal data masked,
    whose key and tenant it was, and how it was sampled. If lines come faster than they can be masked and written, some
    are left out, which the log tells: no request waits. The file may be moved away (logrotate): the next line begins a
    new one.

    Args:
      path: of the file; lines are put at its end.
      mask: takes the personal data out of a text.

    Attributes:
      dropped: lines that were left out.

    Raises:
      UserError: it can't be written.
    """

    def __init__(self, path: str | os.PathLike, mask: Callable[[str], str] = pii.mask) -> None:
        path = os.path.abspath(os.path.expanduser(path))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = _PrivateFile(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"can't write the interactions file {path}: {error.strerror or error}") from None
        self._mask = mask
        self.dropped = 0
        self._complained = -_COMPLAIN_S
        self._waiting: queue.Queue[_Interaction | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="interactions", daemon=True)
        self._thread.start()

    def add(self, admission: Admission, prompt_ids: Sequence[int], sampling: SamplingParams, answer: Sequence[Delta],
            tokenizer: Any) -> None:
        """Takes an interaction that has ended, however it did; never waits."""
        one = _Interaction(time.time(), admission.caller, admission.identity or Identity(), admission.tenant,
                           tuple(prompt_ids), tokenizer.decode, sampling, answer)
        try:
            self._waiting.put_nowait(one)
        except queue.Full:
            self.dropped += 1
            if time.monotonic() - self._complained >= _COMPLAIN_S:
                self._complained = time.monotonic()
                log.warning("%d interactions so far are not in the log: they come faster than they can be written",
                            self.dropped)

    def close(self) -> None:
        """Writes what waits, for `CLOSE_S` at most, and closes the file."""
        try:
            self._waiting.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)
        except queue.Full:
            log.warning("interactions that still waited are not in the log")
        self._file.close()

    def _run(self) -> None:
        while (one := self._waiting.get()) is not None:
            try:
                line = json.dumps(self._told(one), ensure_ascii=False)
            except Exception:  # nothing that one interaction holds may end the log
                log.exception("an interaction could not be written down")
                continue
            self._file.handle(logging.makeLogRecord({"msg": line}))

    def _told(self, one: _Interaction) -> dict[str, Any]:
        caller = one.caller
        asked = {field.name: value for field in dataclasses.fields(one.sampling)
                 if (value := getattr(one.sampling, field.name)) != getattr(_DEFAULTS, field.name)}
        if one.sampling.constraint is not None:
            asked["constraint"] = {name: self._masked(text) for name, text
                                   in dataclasses.asdict(one.sampling.constraint).items()}
        if "stop" in asked:
            asked["stop"] = [self._masked(text) for text in one.sampling.stop]
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.ended)), "request_id": caller.request_id,
            "key_id": one.identity.key_id, "tenant": one.tenant, "interface": caller.interface,
            "method": caller.method, "prompt": self._masked(one.decode(one.prompt_ids)),
            "answers": [{"text": self._masked(sample.text), "finish_reason": sample.finish_reason}
                        for sample in one.answer],
            "sampling": asked}

    def _masked(self, text: str) -> str:
        if len(text) <= MAX_CHARACTERS:
            return without_keys(self._mask(text))
        return without_keys(self._mask(text[:MAX_CHARACTERS + _MAX_PIECE]))[:MAX_CHARACTERS] + "…"


class _PrivateFile(logging.handlers.WatchedFileHandler):
    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return io.TextIOWrapper(open(descriptor, "ab"), encoding=self.encoding, errors=self.errors)
