"""Completions of a run directory's model from Python: the engine of the server, without one."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax import compile_cache
from llm_jax.inference import generation
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.request import InvalidRequest
from llm_jax.inference.service import Service

if TYPE_CHECKING:
    from llm_jax.runs import Run

ROWS = (1, 8, 32)  # of the engines that are made; what is asked beyond runs in turn

log = logging.getLogger(__name__)


class Offline:
    """What `Run.generate`, `complete` and `embed` stand on; the engine is made when it is first needed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._service: Service | None = None
        self._told = False  # what generation_config.json asks for in vain

    def complete(self, prompts: Sequence[str], n: int | None, best_of: int | None,
                 **sampling: Any) -> list[list[generation.Completion]]:
        """The completions of each prompt; arguments as of `Run.complete`."""
        params = self._run.sampling_defaults.params(**sampling)  # may be refused: before the engine
        wanted = 1 if n is None else n
        count = wanted if best_of is None else best_of
        if not 1 <= wanted <= count:
            raise InvalidRequest(f"n={wanted} must be at least 1 and at most best_of={count}")
        if not prompts:
            return []
        service = self.service(len(prompts) * count)
        each = [dataclasses.replace(params, sample=i) for i in range(count)]
        ids = [tokens for text in prompts for tokens in [service.encode(text)] * count]
        flat = generation.complete(service, ids, each * len(prompts))
        found = [flat[start:start + count] for start in range(0, len(flat), count)]
        if count == wanted:
            return found
        return [sorted(one, key=lambda c: -c.mean_logprob)[:wanted] for one in found]

    def embed(self, texts: Sequence[str], pooling: str) -> np.ndarray:
        """Embeddings, float32 [n, D]."""
        if not texts:
            return np.zeros((0, self._run.config.embed_dim), np.float32)
        service = self.service(len(texts))
        return generation.embed(service, [service.encode(text) for text in texts], pooling)

    def service(self, count: int) -> Service:
        """The service of an engine with rows for `count` requests at once, or for the most that pay.

        One of a single row has but two programs to compile, so a lone prompt gets that. The first list makes a larger
        one, which lone prompts then use as well: they have programs of one row there too.
        """
        rows = next((rows for rows in ROWS if rows >= count), ROWS[-1])
        if self._service is not None and self._service.engine.options.max_rows >= rows:
            return self._service
        self.close()
        compile_cache.enable_compile_cache()
        engine, tokenizer = self._run.engine(generation.ALONE if rows == 1 else EngineConfig(max_rows=rows))
        engine.compile()
        defaults = self._run.sampling_defaults
        for note in () if self._told else defaults.notes:
            log.warning("%s: %s", self._run.directory, note)
        self._told = True
        self._service = Service(engine, tokenizer, max_queue=sys.maxsize, defaults=defaults)
        return self._service

    def close(self) -> None:
        """Ends the engine and lets go of its weights; what comes later makes another."""
        if self._service is not None:
            self._service.close()
        self._service = None
