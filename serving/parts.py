"""What stands between the doors and the engine, made from the options: keys, limits, filters, caches, counts."""

from __future__ import annotations

import contextlib
import tempfile

from llm_jax.errors import UserError
from serving.access.guard import Guard
from serving.access.tls import Tls
from serving.cache import ResponseCache
from serving.calls import Calls
from serving.engine.front import Front
from serving.filters import Filters
from serving.http.tool_formats import FORMATS
from serving.interactions import Interactions
from serving.metrics import Metrics
from serving.options import ServerOptions
from serving.state import State
from serving.tracing import Traces


class Parts:
    """The parts of one server. Making them needs no model, so that a wrong file is found before one is loaded.

    Attributes:
      options: what they are made from.
      guard: who may come in.
      tls: certificates; None for plain text.
      metrics: what is counted.
    """

    def __init__(self, options: ServerOptions = ServerOptions()) -> None:  # noqa: B008 (frozen)
        """Opens the files.

        Raises:
          UserError: one can't be read or written, or is wrong; a filter or a format of tool calls is unknown.
        """
        self.options = options
        if options.tool_format is not None and options.tool_format not in FORMATS:
            raise UserError(f"tool_format must be one of {', '.join(FORMATS)}, not {options.tool_format!r}")
        self.metrics = Metrics()
        self.tls = Tls.from_options(options)
        self._filters = Filters.load(options.filters)
        self._cache = (ResponseCache(options.model_name, options.response_cache_entries, options.response_cache_seconds)
                       if options.response_cache_entries else None)
        self._state: State | None = None
        self._interactions: Interactions | None = None
        self._traces: Traces | None = None
        with contextlib.ExitStack() as opened:
            if options.state_dir is not None:
                self._state = opened.enter_context(contextlib.closing(State(options.state_dir)))
            self.guard = opened.enter_context(contextlib.closing(Guard.from_options(options)))
            if options.interactions_file is not None:
                self._interactions = opened.enter_context(contextlib.closing(Interactions(options.interactions_file)))
            if options.traces:
                self._traces = opened.enter_context(contextlib.closing(Traces(options.model_name)))
            self._opened = opened.pop_all()

    def calls(self, front: Front) -> Calls:
        """The pipeline of all doors."""
        return Calls(front, guard=self.guard, metrics=self.metrics, cache=self._cache, filters=self._filters,
                     interactions=self._interactions, traces=self._traces)

    def state(self) -> State:
        """What survives a restart; without a folder for it one that is forgotten at the end."""
        if self._state is None:
            folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="llm_jax-"))
            self._state = self._opened.enter_context(contextlib.closing(State(folder)))
        return self._state

    def close(self) -> None:
        """Closes the files; what is buffered is written."""
        self._opened.close()
