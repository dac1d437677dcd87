"""This project's engine under the archived JetStream server: its Engine API (google-jetstream 0.2.2) over ours.

    pip install 'llm_jax[jetstream]'
    python -m serving.jetstream_adapter --run_dir=runs/quickstart --port=9000

For comparing with, and for those who still run that server; the server of this project answers the same clients, and
has what that one lacks (sampling and limits per request, cancellation, a bound on the queue). It never says that a slot
is free again: so each slot has pages of its own, for a whole context.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jetstream.core import config_lib, server_lib
from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2

from llm_jax import compile_cache, runs
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.batch import Asked
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sequence import Chunk, Plan
from llm_jax.inference.sequence import Sequence as Running

_NO_BOS = -1  # stands where the server puts a beginning-of-sequence token that the model does not have
_BUCKETS = tuple(2**i for i in range(4, 16))  # lengths to which the server pads a prompt


class EngineAdapter(engine_api.Engine):
    """Our engine as that server calls it, from its one generating thread.

    A prompt is computed when it is inserted, but for its last token; each `generate` then carries one token of every
    slot. A slot whose completion has reached an end token or the context's end rests until it is taken again.

    Args:
      engine: compiled; its pool has pages for a whole context in every slot.
      tokenizer: the model's.
      params: how every request is drawn; that server's requests do not say.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, params: SamplingParams = SamplingParams()) -> None:  # noqa: B008
        g = engine.geometry
        if g.num_pages < g.num_slots * g.pages_per_row:
            raise UserError(f"the server never says that a slot is free, so the pool needs {g.pages_per_row} pages for "
                            f"each of {g.num_slots} rows; it has {g.num_pages}")
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = dataclasses.replace(params, max_tokens=engine.max_context)
        self._running: dict[int, Running] = {}

    @classmethod
    def from_run(cls, run_dir: str, options: EngineConfig | None = None) -> EngineAdapter:
        """Loads and compiles a run directory's model, sampled as it came configured."""
        run = runs.load(run_dir)
        options = options or EngineConfig()
        context = options.max_context or run.config.max_context
        pages = options.max_rows * -(-context // options.page_size)
        engine, tokenizer = run.engine(dataclasses.replace(options, num_pages=pages))
        engine.compile()
        return cls(engine, tokenizer, run.sampling_defaults.params(max_tokens=1))

    def load_params(self, *args: Any, **kwargs: Any) -> Any:
        """The weights, which the engine has itself."""
        return ()

    def init_decode_state(self, *args: Any, **kwargs: Any) -> Any:
        """The state, which the engine has itself."""
        self._running.clear()
        return ()

    def prefill(self, *, params: Any, existing_prefix: Any = None, padded_tokens: Any, true_length: int) -> np.ndarray:
        """The prompt's own tokens; `insert` computes them."""
        if existing_prefix is not None:
            raise NotImplementedError("a prefix that is there already: the server of 0.2.2 never has one")
        tokens = np.asarray(padded_tokens)[:true_length]
        return tokens[1:] if tokens[0] == _NO_BOS else tokens

    def insert(self, prefix: np.ndarray, decode_state: Any, slot: int) -> Any:
        """Computes the prompt into the slot's pages, whatever was there before."""
        g, tokens = self._engine.geometry, np.asarray(prefix).tolist()
        sequence = self._running[slot] = Running(
            slot, tokens, len(tokens), self._engine.max_context, slot=slot, admissions=1,
            pages=list(range(slot * g.pages_per_row, (slot + 1) * g.pages_per_row)))
        for start in range(0, len(tokens) - 1, g.chunk):
            count = min(g.chunk, len(tokens) - 1 - start)
            self._run(Plan((), (Chunk(sequence, start, count),)))
            sequence.computed = start + count
        return decode_state

    def generate(self, params: Any, decode_state: Any) -> tuple[Any, engine_api.ResultTokens]:
        """One token of every slot; those that have none are not valid."""
        drawn = self._run(Plan(tuple(Chunk(s, s.computed, 1) for s in self._running.values()), ()))
        data = np.zeros((self.max_concurrent_decodes, 3), np.int32)  # token, whether it is one, tokens so far
        for slot, sequence in list(self._running.items()):
            (token,) = drawn[slot].tokens
            sequence.tokens.append(token)
            sequence.computed += 1
            data[slot] = token, 1, sequence.num_generated
            if token in self._tokenizer.end_ids or len(sequence.tokens) >= self._engine.max_context:
                del self._running[slot]
        return decode_state, engine_api.ResultTokens(data, (0, 1), (1, 2), (2, 3), self.samples_per_slot)

    def get_tokenizer(self) -> Any:
        """Nothing: `build_tokenizer` needs no file."""
        return tokenizer_pb2.TokenizerParameters()

    def build_tokenizer(self, metadata: Any) -> _Tokenizer:
        """The model's own tokenizer."""
        return _Tokenizer(self._tokenizer)

    def get_prefix_destination_sharding(self) -> Any:
        """Where prompts go: they stay on the host."""
        return None

    @property
    def max_concurrent_decodes(self) -> int:
        return self._engine.geometry.num_slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return max(length for length in _BUCKETS if length < self._engine.max_context)

    @property
    def mesh(self) -> Any:
        return None

    @property
    def colocated_cpus(self) -> Any:
        return None

    def _run(self, plan: Plan) -> Any:
        """Carries out a step: what each sequence drew."""
        asked = {c.sequence.id: Asked(self._params, c.sequence.slot, len(c.sequence.tokens), (), None)
                 for c in plan if c.samples}
        return self._engine.execute(self._engine.prepare(plan, asked)).drawn


class _Tokenizer(tokenizer_api.Tokenizer):
    """The model's tokenizer as that server calls it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, s: str, **kwargs: Any) -> tuple[Any, int]:
        tokens = np.array(self._tokenizer.encode(s), np.int32)
        return token_utils.pad_tokens(tokens, self.bos_id, self.pad_id, **kwargs)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text; a lone byte of a character as the server joins them again, `<0xE5>`."""
        data = b"".join(map(self._tokenizer.token_bytes, token_ids))
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"<0x{data[0]:02X}>" if len(data) == 1 else data.decode(errors="replace")

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def eos_id(self) -> int:
        return self._tokenizer.end_ids[0] if self._tokenizer.end_ids else _NO_BOS  # in `stop_tokens` are all of them

    @property
    def bos_id(self) -> int:
        bos_id = self._tokenizer.bos_id if self._tokenizer.adds_bos else None
        return _NO_BOS if bos_id is None else bos_id

    @property
    def stop_tokens(self) -> set[int]:
        return set(self._tokenizer.end_ids)


def serve(engine: EngineAdapter, port: int) -> server_lib.JetStreamServer:
    """Starts the archived server over the engine, for this machine alone: it asks nobody who they are."""
    server_lib._HOST = "127.0.0.1"  # "[::]" by itself, every address that the machine has
    if not hasattr(jax, "tree_map"):  # which JAX has taken away since, and without which it ends at its first request
        jax.tree_map = jax.tree_util.tree_map  # type: ignore[attr-defined]
    # It counts devices by the slice's name, and gives them to the engine, which has placed itself already.
    config = config_lib.ServerConfig(interleaved_slices=("cpu=1",),
                                     interleaved_engine_create_fns=(lambda devices: engine,))
    return server_lib.run(port=port, config=config, devices=jax.devices()[:1])


def main(argv: Sequence[str] | None = None) -> int:
    """Loads, compiles, serves until it is ended."""
    parser = argparse.ArgumentParser(prog="python -m serving.jetstream_adapter", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True, help="run directory of the model")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--max_rows", type=int, default=8, help="requests at once")
    parser.add_argument("--max_context", type=int, default=None, help="prompt and completion together, in tokens")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, force=True)  # importing that server has set DEBUG, for everybody
    compile_cache.enable_compile_cache()
    try:
        engine = EngineAdapter.from_run(args.run_dir, EngineConfig(
            max_rows=args.max_rows, prefill_rows=1, max_context=args.max_context))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = serve(engine, args.port)
    print(f"ready: 127.0.0.1:{args.port}", flush=True)
    server.wait_for_termination()
    return 0


if __name__ == "__main__":
    sys.exit(main())
